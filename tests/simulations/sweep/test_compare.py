"""Runs side by side: only what differs, what came out, and how far the adapters are apart."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedgraft.core.errors import UserError
from fedgraft.server import checkpoints
from fedgraft.simulations.sweep.compare import Comparison, as_table, write
from fedgraft.simulations.sweep.run import Outcome


@pytest.fixture(scope="module")
def runs(done: Outcome) -> dict[str, Path]:
    return {path.name: path for path in (done.folder / "runs").iterdir()}


def pair(runs: dict[str, Path], *names: str) -> Comparison:
    return Comparison.of([runs[name] for name in names])


def rendered(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(as_table(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined]


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose run.json says otherwise."""
    shutil.copytree(folder, to)
    run = json.loads((to / "run.json").read_text())
    (to / "run.json").write_text(json.dumps({**run, **changes}))
    return to


def test_only_the_settings_that_differ_are_told(runs: dict[str, Path]):
    found = pair(runs, "strategy=fedit,seed=5", "strategy=ffa,seed=6")
    assert dict(found.differing) == {"seed": (5, 6), "strategy": ("fedit", "ffa")}
    titles = [title for title, _ in found.lines()]
    assert titles[:3] == ["seed", "strategy", "status"] and "train.lr" not in titles


def test_adapters_are_as_far_apart_as_their_furthest_number(runs: dict[str, Path]):
    found = pair(runs, "strategy=fedit,seed=5", "strategy=fedit,seed=6")
    first, other = (checkpoints.load_last(run.folder / "checkpoints").state for run in found.runs)
    furthest = 0.0
    for name in first:
        for a, b in zip(first[name].ravel().tolist(), other[name].ravel().tolist(), strict=True):
            furthest = max(furthest, abs(a - b))
    assert found.distances == (0.0, pytest.approx(furthest, rel=1e-12)) and furthest > 1e-3
    assert found.equal is False


def test_equal_runs_are_said_to_be_equal(runs: dict[str, Path], tmp_path: Path):
    twin = shutil.copytree(runs["strategy=ffa,seed=5"], tmp_path / "twin")
    found = Comparison.of([runs["strategy=ffa,seed=5"], twin])
    assert found.equal is True and found.distances == (0.0, 0.0) and not found.differing
    assert found.notes == ["the configurations are equal", "the final adapters are equal, bit by bit"]
    assert found.lines()[-1] == ("from the first", ["", "equal"])


def test_adapters_of_other_shapes_have_no_distance(tiny_federation: Any, runs: dict[str, Path], tmp_path: Path):
    config = tiny_federation.config(rounds=1, **{"train.local_steps": 1, "method.rank": 2})
    tiny_federation.run(config, tmp_path / "other")
    found = Comparison.of([runs["strategy=fedit,seed=5"], tmp_path / "other"])
    assert found.distances == (0.0, None)
    assert found.differing["method.rank"] == (4, 2)


def test_a_run_that_is_going_on_can_be_compared(runs: dict[str, Path], tmp_path: Path):
    going = changed(
        runs["strategy=ffa,seed=5"],
        tmp_path / "going",
        status="running",
        rounds=0,
        accuracy={"before": None, "after": None},
        loss={"before": None, "after": None},
    )
    shutil.rmtree(going / "checkpoints")
    (going / "metrics.jsonl").write_text("")
    found = Comparison.of([runs["strategy=ffa,seed=5"], going])
    assert found.equal is None and found.distances == (0.0, None)
    assert found.notes[1:] == ["going: no evaluation yet", "going: running"]
    assert dict(found.lines())["accuracy"][1] == "–"
    assert write(found, tmp_path / "c.svg").stat().st_size > 0, "the other's curve can be drawn"
    alone = Comparison.of([going, shutil.copytree(going, tmp_path / "again")])
    with pytest.raises(UserError, match="none of the runs has an evaluation yet"):
        write(alone, tmp_path / "d.svg")


def test_a_run_from_before_a_section_existed_can_be_compared(runs: dict[str, Path], tmp_path: Path):
    config = json.loads((runs["strategy=ffa,seed=5"] / "run.json").read_text())["config"]
    del config["simulation"]
    old = changed(runs["strategy=ffa,seed=5"], tmp_path / "old", config=config)
    found = Comparison.of([runs["strategy=ffa,seed=5"], old])
    assert found.equal and found.runs[1].numbers == found.runs[0].numbers


def test_why_a_run_failed_is_told(runs: dict[str, Path], tmp_path: Path):
    failed = changed(runs["strategy=ffa,seed=5"], tmp_path / "failed", status="failed", error="the roof fell in")
    assert "failed: failed: the roof fell in" in Comparison.of([runs["strategy=ffa,seed=5"], failed]).notes


def test_runs_of_one_name_are_told_apart_by_their_paths(runs: dict[str, Path], tmp_path: Path):
    one = shutil.copytree(runs["strategy=ffa,seed=5"], tmp_path / "a" / "run")
    two = shutil.copytree(runs["strategy=ffa,seed=6"], tmp_path / "b" / "run")
    assert [run.label for run in Comparison.of([one, two]).runs] == [str(one), str(two)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda done, tmp: [tmp], "give two or more run directories"),
        (lambda done, tmp: [tmp / "x", tmp / "y"], r"x: no such run directory"),
        (lambda done, tmp: [tmp, done.folder / "runs"], r"holds no run \(no run.json\)"),
        (lambda done, tmp: [done.folder, tmp], r"is a sweep; name runs of it, such as .*/runs/\*"),
        (lambda done, tmp: [tmp, tmp / "."], "a run directory is there twice"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(done: Outcome, tmp_path: Path, make: Any, said: str):
    with pytest.raises(UserError, match=said) as refusal:
        Comparison.of(make(done, tmp_path))
    assert "\n" not in str(refusal.value)


def test_few_runs_stand_abreast_and_many_below_one_another(runs: dict[str, Path]):
    few, many = pair(runs, *sorted(runs)[2:4]), Comparison.of([runs[name] for name in sorted(runs)])
    assert "accuracy before" in rendered(few) and len(many.runs) == 6
    head = next(line for line in rendered(many).splitlines() if "run " in line)
    assert "accuracy" in head and "engine" not in head
    for run in many.runs:
        assert str(run.run["digest"])[:12] in rendered(many)
    assert many.notes[0].endswith("settings differ: --output FILE.csv, .md or .html has them all")


def test_the_files_hold_what_the_table_holds(runs: dict[str, Path], tmp_path: Path):
    found = pair(runs, "strategy=fedit,seed=5", "strategy=ffa,seed=5", "baseline=none,seed=5")
    lines = list(csv.DictReader(write(found, tmp_path / "c.csv").read_text().splitlines()))
    assert [line["strategy"] for line in lines] == ["fedit", "ffa", "fedit"]
    assert [float(line["accuracy"]) for line in lines] == [run.numbers["accuracy"] for run in found.runs]
    assert [line["rounds"] for line in lines] == ["2", "2", "0"]
    table = write(found, tmp_path / "c.md").read_text()
    html = write(found, tmp_path / "c.html").read_text()
    for title, shown in found.lines():
        assert f"| {title} | {' | '.join(shown)} |" in table
        assert title in html
    assert html.count("<svg") == 2 and "strategy=ffa" in write(found, tmp_path / "c.svg").read_text()


def test_another_ending_is_refused(runs: dict[str, Path], tmp_path: Path):
    found = pair(runs, "strategy=fedit,seed=5", "strategy=ffa,seed=5")
    with pytest.raises(UserError, match=re.escape("the ending says what to write: .html, .svg, .md, .csv")):
        write(found, tmp_path / "c.pdf")


def test_the_object_for_programs_holds_all_numbers(runs: dict[str, Path]):
    told = json.loads(json.dumps(pair(runs, "strategy=fedit,seed=5", "strategy=ffa,seed=5").to_dict()))
    assert told["differing"] == {"strategy": ["fedit", "ffa"]} and told["adapters_equal"] is False
    assert [run["run"] for run in told["runs"]] == ["strategy=fedit,seed=5", "strategy=ffa,seed=5"]
    assert told["runs"][0]["distance"] == 0.0 and np.isfinite(told["runs"][1]["distance"])
