"""The plan's neighbours: each is what planning it would give, and the picture shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.tradeoff import Tradeoff, _with_batch, draw, tradeoff


def _config(rounds: int = 4, batch: int = 40, **privacy: Any) -> RunConfig:
    return parse_config(
        {
            "model": "somewhere",
            "rounds": rounds,
            "data": {"sites": ["a"]},
            "train": {"batch_size": batch, "local_steps": 3},
            "privacy": {"epsilon": 8.0, "delta": 1e-4, "accountant": "rdp", **privacy},
        }
    )


@pytest.fixture(scope="module")
def found() -> Tradeoff:
    return tradeoff(_config(), 500)


def test_the_planned_run_stands_on_every_axis(found: Tradeoff) -> None:
    plan = PrivacyPlan.for_run(_config(), 500, 12)
    assert found.plan == plan
    for rows, value in ((found.noise, plan.noise_multiplier), (found.batch, 40), (found.rounds, 4)):
        (planned,) = [one for one in rows if one.planned]
        assert (planned.value, planned.epsilon, planned.needed) == (value, plan.final_epsilon, plan.noise_multiplier)
        assert planned.on_the_mean == found.on_the_mean == plan.noise_multiplier / 40


def test_each_neighbour_is_what_planning_it_would_give(found: Tradeoff) -> None:
    noise = found.plan.noise_multiplier
    assert [one.value for one in found.batch] == [10, 20, 40, 80, 160]
    assert [one.value for one in found.rounds] == [1, 2, 4, 8, 16]
    for one in found.noise:
        assert one.epsilon == epsilon((Event(one.value, 0.08, 12),), 1e-4, accountant="rdp")
    for one in found.batch:
        assert one.epsilon == epsilon((Event(noise, one.value / 500, 12),), 1e-4, accountant="rdp")
        needed = PrivacyPlan.for_run(_config(batch=int(one.value)), 500, 12).noise_multiplier
        assert (one.needed, one.on_the_mean) == (needed, needed / one.value)
    for one in found.rounds:
        steps = 3 * int(one.value)
        assert one.epsilon == epsilon((Event(noise, 0.08, steps),), 1e-4, accountant="rdp")
        assert one.needed == PrivacyPlan.for_run(_config(rounds=int(one.value)), 500, steps).noise_multiplier


def test_under_a_given_noise_the_needed_one_is_told_all_the_same(found: Tradeoff) -> None:
    given = tradeoff(_config(noise_multiplier=3.0), 500)
    assert given.plan.noise_multiplier == 3.0
    (planned,) = [one for one in given.rounds if one.planned]
    assert planned.needed == found.plan.noise_multiplier < 3.0
    assert planned.epsilon == given.plan.final_epsilon < 8.0


def test_neighbours_that_are_refused_or_out_of_reach_say_so() -> None:
    banded = tradeoff(_config(bands=4), 500)
    assert [one.epsilon is None for one in banded.batch] == [False, False, False, False, True]
    budget = 1.05 * epsilon((Event(90.0, 1.0, 12),), 1e-4)
    hard = tradeoff(_config(batch=100, epsilon=budget, noise_multiplier=90.0, accountant="pld"), 100)
    assert hard.rounds[-1].epsilon == epsilon((Event(90.0, 1.0, 48),), 1e-4) > budget
    assert (hard.rounds[-1].needed, hard.rounds[-1].on_the_mean) == (None, None)


def test_a_cut_down_batch_is_cut_down_in_proportion() -> None:
    config = _config(batch=40, accountant="pld", sampler="truncated_poisson", max_batch=60)
    assert [_with_batch(config, batch).privacy.max_batch for batch in (10, 20, 40, 80, 1)] == [15, 30, 60, 120, 2]
    assert _with_batch(_config(), 10).privacy.max_batch == 0


def test_a_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.batch_size 40 is more than the site's 39 records"):
        tradeoff(_config(), 39)


def test_the_picture_shows_three_panels(found: Tradeoff, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    draw(found, path)
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    # The curve's blue and the budget's red are in each third of the picture.
    for third in np.array_split(pixels, 3, axis=1):
        for colour in ((43, 108, 176), (176, 58, 46)):
            near = np.abs(third * 255 - np.array(colour)).max(axis=-1) < 12
            assert near.sum() > 100


def test_a_picture_that_cannot_be_written_is_a_users_error(found: Tradeoff, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/plan.png: the plot cannot be written: No such file or directory"):
        draw(found, tmp_path / "nowhere" / "plan.png")
