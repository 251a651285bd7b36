"""Rows say what the run directories say, groups what the seeds say, and a mark is earned."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedgraft.simulations.sweep.plan import Sweep
from fedgraft.simulations.sweep.results import Curve, Group, Results, curve, row
from fedgraft.simulations.sweep.run import Outcome
from fedgraft.simulations.sweep.statistics import Estimate


def group(
    strategy: str, promise: float | None = 2.0, baseline: str = "", **estimates: tuple[float, float | None]
) -> Group:
    found = {name: Estimate(mean, half, 3 if half is not None else 1) for name, (mean, half) in estimates.items()}
    return Group((("strategy", strategy),), baseline, promise, found, 3, 3, "", ())


def results(*groups: Group) -> Results:
    return Results("made", ("strategy",), (), groups)


def test_a_row_is_what_the_run_directory_says(done: Outcome, planned: Sweep):
    for found in done.results.rows:
        run = json.loads((Path(found["path"]) / "run.json").read_text())
        assert found["status"] == "finished" and found["error"] == ""
        assert found["accuracy_before"] == run["accuracy"]["before"] and found["accuracy"] == run["accuracy"]["after"]
        assert found["loss"] == run["loss"]["after"] and found["digest"] == run["digest"]
        assert found["worst_site_accuracy"] == min(site["accuracy"] for site in run["sites"].values())
        assert found["bytes_up_site"] * 3 == found["bytes_up"] == run["bytes_up"]
        assert found["epsilon"] is None and found["virtual_seconds"] is None


def test_the_files_hold_the_rows(done: Outcome):
    with (done.folder / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    told = json.loads((done.folder / "results.json").read_text())
    assert told["rows"] == list(done.results.rows)
    assert [line["strategy"] for line in lines] == [found.get("strategy", "") for found in done.results.rows]
    assert [float(line["accuracy"]) for line in lines] == [found["accuracy"] for found in done.results.rows]
    assert [line["epsilon"] for line in lines] == [""] * 6
    (fedit,) = (found for found in told["groups"] if found.get("strategy") == "fedit")
    own = [found["accuracy"] for found in done.results.rows if found.get("strategy") == "fedit"]
    assert fedit["accuracy"]["mean"] == pytest.approx(statistics.fmean(own)) and fedit["accuracy"]["n"] == 2
    assert fedit["accuracy"]["high"] - fedit["accuracy"]["mean"] == pytest.approx(
        12.706 * statistics.stdev(own) / 2**0.5, rel=1e-3
    )


def test_a_curve_counts_what_a_site_sent_in_training_by_then(done: Outcome):
    (path,) = {found["path"] for found in done.results.rows if found.get("strategy") == "ffa" and found["seed"] == 5}
    lines = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    sent = [line["bytes_up"] / 3 for line in lines if line["kind"] == "train"]
    assert curve(Path(path)) == Curve(
        (0, 1, 2),
        tuple(line["accuracy"] for line in lines if line["kind"] == "evaluate"),
        (0.0, sent[0], sent[0] + sent[1]),
    )


def test_a_run_that_is_still_to_come_says_so(planned: Sweep, tmp_path: Path):
    found = row(planned.runs[0], tmp_path / "none", {})
    assert found["status"] == "waiting" and found["accuracy"] is None
    found = row(planned.runs[0], tmp_path / "none", {planned.runs[0].name: "no memory"})
    assert found["status"] == "failed" and found["error"] == "no memory"


def test_federations_come_before_their_baselines(done: Outcome):
    assert [found.baseline for found in done.results.groups] == ["", "", "none"]
    assert [found.finished for found in done.results.groups] == [2, 2, 2]


@pytest.mark.parametrize(
    ("groups", "marked"),
    [
        ([group("a", accuracy=(0.9, 0.01)), group("b", accuracy=(0.8, 0.02))], ["a"]),
        ([group("a", accuracy=(0.9, 0.06)), group("b", accuracy=(0.8, 0.05))], []),
        ([group("a", accuracy=(0.9, None)), group("b", accuracy=(0.1, None))], []),
        ([group("a", accuracy=(0.9, 0.01)), group("b", 8.0, accuracy=(0.95, 0.01))], []),
        ([group("a", accuracy=(0.9, 0.01)), group("b", baseline="full", accuracy=(0.99, 0.0))], []),
        (
            [
                group(*each, accuracy=(mean, 0.01))
                for each, mean in ((("a", 2.0), 0.9), (("b", 2.0), 0.5), (("c", None), 1.0))
            ],
            ["a"],
        ),
    ],
)
def test_the_best_is_marked_only_where_intervals_of_one_promise_lie_apart(groups: list[Group], marked: list[str]):
    found = results(*groups)
    assert [dict(each.values)["strategy"] for each in groups if found.best("accuracy", each)] == marked


def test_of_losses_and_bytes_the_smallest_is_best():
    a, b = group("a", loss=(0.5, 0.01), bytes_up_site=(10, 0.0)), group("b", loss=(0.9, 0.01), bytes_up_site=(5, 0.0))
    found = results(a, b)
    assert found.best("loss", a) and not found.best("loss", b)
    assert found.best("bytes_up_site", b) and not found.best("bytes_up_site", a)


def test_nobody_is_the_best_at_the_budget_that_all_were_given():
    a, b = group("a", epsilon=(1.0, 0.01)), group("b", epsilon=(2.0, 0.01))
    assert not any(results(a, b).best("epsilon", each) for each in (a, b))


def test_who_holds_all_records_has_no_worst_site(tiny_federation: Any, tmp_path: Path):
    config = tiny_federation.config(rounds=1, **{"simulation.baseline": "central", "train.local_steps": 1})
    from fedgraft.simulations.sweep.grid import Point
    from fedgraft.simulations.sweep.plan import Planned

    tiny_federation.run(config, tmp_path / "run")
    found = row(Planned(Point((), "central"), config), tmp_path / "run", {})
    assert found["accuracy"] is not None
    assert found["worst_site_accuracy"] is None and found["bytes_up_site"] is None
