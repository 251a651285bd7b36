"""What a person reads of a run: numbers as people read them, names taken literally, tables that end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgraft.simulations.display import Lines, closing_lines, final_table, percent, phase_line, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (15_300, "15.3 kB"),
        (2_000_000, "2.0 MB"),
        (90_800_000, "90.8 MB"),
        (14_000_000_000, "14.00 GB"),
    ],
)
def test_bytes_as_people_read_them(count: int, text: str) -> None:
    assert size(count) == text


def test_shares_as_people_read_them() -> None:
    assert [percent(value) for value in (None, 0.0, 0.4567, 1.0)] == ["–", "0.0 %", "45.7 %", "100.0 %"]


@pytest.fixture(scope="module")
def run(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shown") / "run [bold]x[/]"
    config = tiny_federation.private(rounds=2, name="name [red]", **{"privacy.noise_multiplier": 2.0})
    return dict(tiny_federation.run(config, folder))


def shown(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_says_what_was_promised_to_whom(run: dict[str, Any]) -> None:
    text = shown(final_table(run))
    assert "name [red]: 2 rounds of fedit, lora" in text
    for name, site in run["sites"].items():
        (row,) = [line for line in text.splitlines() if f" {name} " in line]
        assert f"{site['epsilon']:.2f}" in row
        assert "0.001" in row
        assert "patient" in row
        assert str(site["units"]) in row
        assert percent(site["accuracy"]) in row
    last = next(line for line in text.splitlines() if " all " in line)
    assert f"≤ {max(site['epsilon'] for site in run['sites'].values()):.2f}" in last
    assert str(sum(site["records"] for site in run["sites"].values())) in last


def test_without_privacy_the_table_says_none(run: dict[str, Any]) -> None:
    bare = json.loads(json.dumps(run))
    bare["config"]["privacy"]["enabled"] = False
    for site in bare["sites"].values():
        site.update(epsilon=None, delta=None, unit=None, privacy=None)
    text = shown(final_table(bare))
    assert text.count(" none ") == 4
    assert "patients" not in text


def test_the_last_lines_give_cost_and_paths(run: dict[str, Any]) -> None:
    lines = closing_lines(run)
    assert size(run["bytes_up_round"]) in lines[0]
    assert size(run["bytes_full_model"]) in lines[0]
    assert lines[-2] == f"adapter  {run['adapter_path']}"
    assert lines[-1] == f"report   {run['report_path']}"
    assert "[bold]x[/]" in lines[-1]


def test_a_line_for_each_phase(run: dict[str, Any]) -> None:
    folder = Path(run["report_path"]).parent
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    texts = [phase_line(record, 2) for record in records]
    assert texts[0].startswith(f"round 0/2  evaluate  accuracy {percent(records[0]['accuracy'])}  loss ")
    assert texts[1].startswith("round 1/2  train")
    assert "ε ≤ " in texts[1]
    nothing = {**records[0], "accuracy": None, "loss": None}
    assert "accuracy –" in phase_line(nothing, 2)


def test_plain_lines_take_brackets_literally() -> None:
    console = Console(file=io.StringIO(), width=200)
    Lines(console, None).note("site [/red] is missing")  # type: ignore[arg-type]
    assert console.file.getvalue() == "site [/red] is missing\n"  # type: ignore[attr-defined]


def test_a_line_says_how_many_are_missing(run: dict[str, Any]) -> None:
    folder = Path(run["report_path"]).parent
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    assert "3 sites  " in phase_line(record, 2) and "missing" not in phase_line(record, 2)
    many = {f"site-{number}": {"records": 5, "loss": 0.5} for number in range(1200)}
    text = phase_line({**record, "sites": many, "missing": {"a": "late", "b": "no answer"}}, 2)
    assert "1,200 sites, 2 missing  loss 0.500" in text


@pytest.mark.parametrize(("count", "rows"), [(30, 30), (31, 10), (5000, 10)])
@pytest.mark.parametrize("known", [True, False])
def test_the_table_of_many_sites_shows_both_ends(run: dict[str, Any], count: int, rows: int, known: bool) -> None:
    site = next(iter(run["sites"].values()))
    names = [f"site-{(number * 37) % count:04d}" for number in range(count)]
    accuracy = {name: number / count if known else None for number, name in enumerate(names)}
    assert len(accuracy) == count  # 37 has no factor in common with any of the counts
    many = {**run, "sites": {name: {**site, "accuracy": accuracy[name]} for name in sorted(names)}}
    text = shown(final_table(many))
    lines = [line for line in text.splitlines() if "site-" in line]
    assert len(lines) == rows
    told = [line.split("│")[1].strip() for line in lines]
    assert told == sorted(told)
    if rows < count:
        assert set(told) == ({*names[:5], *names[-5:]} if known else {*sorted(names)[:5], *sorted(names)[-5:]})
        assert f"and {count - rows:,} more" in text
    else:
        assert " more" not in text
    assert f"{count * site['records']:,}" in text.splitlines()[-2], "the last row counts all of them"
