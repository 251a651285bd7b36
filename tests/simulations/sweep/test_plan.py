"""What a sweep is to run is known, and checked, before it runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.simulations.sweep.grid import Axis
from fedgraft.simulations.sweep.plan import Sweep, make

STRATEGIES = Axis("strategy", ("fedit", "ffa"))


def test_seeds_go_on_from_that_of_the_configuration(planned: Sweep):
    seeds = [run.config.seed for run in planned.runs]
    assert seeds == sorted(seeds) and set(seeds) == {5, 6}
    assert [run.name for run in planned.runs][:3] == [
        "strategy=fedit,seed=5",
        "strategy=ffa,seed=5",
        "baseline=none,seed=5",
    ]


def test_a_baseline_runs_once_for_points_that_it_does_not_tell_apart(short: Callable[..., str]):
    private = {"privacy.enabled": True, "privacy.delta": 1e-3, "evaluate.release": "exact_not_private"}
    grid = [STRATEGIES, Axis("privacy.epsilon", ("2", "8"))]
    sweep = make(short(**private), grid, baselines=("none", "local", "central"))
    assert Counter(run.point.baseline for run in sweep.runs) == {"": 4, "none": 1, "local": 2, "central": 2}
    names = [run.name for run in sweep.runs if run.point.baseline]
    assert names[:3] == [
        *("baseline=none,seed=5", "baseline=local,privacy.epsilon=2,seed=5", "baseline=local,privacy.epsilon=8,seed=5")
    ]


def test_no_training_whose_counts_are_noised_runs_for_every_budget(short: Callable[..., str]):
    private = {"privacy.enabled": True, "privacy.delta": 1e-3}
    sweep = make(short(**private), [Axis("privacy.epsilon", ("2", "8"))], baselines=("none",))
    assert Counter(run.point.baseline for run in sweep.runs) == {"": 2, "none": 2}


def test_it_reads_back_as_it_was_written(planned: Sweep, tmp_path: Path):
    planned.write(tmp_path)
    assert Sweep.read(tmp_path) == planned


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("strategy=fedit,fedti", "strategy=fedti,seed=5: unknown strategy `fedti`; did you mean `fedit`?"),
        ("stratgy=fedit", "unknown key `stratgy`; did you mean `strategy`?"),
        ("train.lr=0.1,-1", "`train.lr`: Input should be greater than 0"),
        ("method.heads=0,2", "method.heads=2,seed=5: method.heads means nothing to method lora"),
        ("data.path=/nowhere.csv", "/nowhere.csv"),
        ("strategy_options.nothing=1", "nothing"),
    ],
)
def test_a_typo_costs_nothing_and_is_named(short: Callable[..., str], grid: str, said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        make(short(), [Axis.parse(grid)])


@pytest.mark.parametrize(
    ("changes", "grid", "said"),
    [
        ({}, "strategy=fedit,ditto", "strategy=ditto,seed=5: .*trains a second adapter on the same records"),
        ({}, "privacy.delta=0.001,0.5", "privacy.delta=0.5,seed=5: .*is not below 1/"),
        ({}, "train.batch_size=8,5000", "train.batch_size=5000,seed=5: .*is more than the site's"),
        ({"method.name": "bitfit"}, "strategy=fedit,ffa", "strategy=ffa,seed=5: "),
    ],
)
def test_a_point_that_a_rule_refuses_is_named_or_left_out(
    short: Callable[..., str], changes: dict[str, Any], grid: str, said: str
):
    private = {"privacy.enabled": True, "privacy.delta": 1e-3, **changes}
    with pytest.raises(UserError, match=said + ".*--skip-refused"):
        make(short(**private), [Axis.parse(grid)])
    sweep = make(short(**private), [Axis.parse(grid)], skip_refused=True)
    assert [bool(run.refused) for run in sweep.runs] == [False, True]


def test_a_grid_of_which_nothing_can_run_is_refused_all_the_same(short: Callable[..., str]):
    with pytest.raises(UserError, match="every point of the grid is refused"):
        make(short(), [Axis("method.heads", ("2", "3"))], skip_refused=True)


def test_two_names_for_one_run_are_refused(short: Callable[..., str]):
    with pytest.raises(UserError, match=r"data\.alpha=1,seed=5 and data\.alpha=1\.0,seed=5 are the same run"):
        make(short(), [Axis("data.alpha", ("1", "1.0"))])


def test_an_unknown_baseline_is_refused(short: Callable[..., str]):
    with pytest.raises(UserError, match="--baselines best: there are none, local, central, full"):
        make(short(), [], baselines=("best",))


def test_more_runs_may_be_added_but_none_changed(short: Callable[..., str], tmp_path: Path):
    config = short()
    small, large = (make(config, [STRATEGIES], seeds=seeds) for seeds in (1, 2))
    large.require_same(small, tmp_path)
    with pytest.raises(UserError, match="with a run strategy=fedit,seed=6; choose another --output"):
        small.require_same(large, tmp_path)
    other = make(config, [STRATEGIES], overrides=["train.lr=0.01"])
    with pytest.raises(UserError, match="whose strategy=fedit,seed=5 has other settings"):
        other.require_same(small, tmp_path)


def test_a_plan_that_was_changed_or_is_none_is_refused(planned: Sweep, tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no sweep \(no sweep.json\)"):
        Sweep.read(tmp_path)
    planned.write(tmp_path)
    path = tmp_path / "sweep.json"
    values = json.loads(path.read_text())
    values["runs"][0]["config"]["rounds"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not the one whose digest stands beside it"):
        Sweep.read(tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a sweep of fedgraft's"):
        Sweep.read(tmp_path)
