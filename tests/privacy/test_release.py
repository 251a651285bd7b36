"""Noised evaluation counts: their sensitivity by brute force, their noise, their price."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.release import LOSS_BOUND, Scores, evaluations_left, noised, release_event

EVEN = math.log(3)


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {"model": "m", "rounds": 5, "data": {"sites": ["a"]}, "privacy": {"epsilon": 4.0}}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            values[section] = {**values.get(section, {}), leaf: value}
        else:
            values[section] = value
    return parse_config(values)


def scores(rows: list[tuple[float, float, float]]) -> Scores:
    return Scores(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


class Silent(RandomStream):
    """Draws zeros, to see what the noise is put on."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)


_record = st.integers(1, 20).flatmap(
    lambda n: st.tuples(st.just(float(n)), st.integers(0, n).map(float), st.floats(0, 1e6) | st.just(math.nan))
)


def _vector(rows: list[list[tuple[float, float, float]]]) -> np.ndarray:
    """The released pair in the units of the guarantee, centred, before noise."""
    flat = [record for unit in rows for record in unit]
    ends = np.cumsum([len(unit) for unit in rows])
    groups = np.split(np.arange(len(flat)), ends[:-1])
    told = noised(scores(flat), groups, EVEN, 0.0, Silent())
    assert told["examples"] == len(rows)
    return np.array([told["correct"], told["loss_sum"] / (LOSS_BOUND * EVEN)]) - len(rows) / 2


@given(rows=st.lists(st.lists(_record, min_size=1, max_size=6), min_size=2, max_size=8))
def test_one_unit_more_moves_the_sum_by_no_more_than_the_bound(rows: list[Any]) -> None:
    """Whatever its records hold, and however many there are."""
    move = _vector(rows) - _vector(rows[:-1])
    assert np.linalg.norm(move) <= math.sqrt(0.5) + 1e-9


@given(
    rows=st.lists(st.lists(_record, min_size=1, max_size=6), min_size=2, max_size=8),
    other=st.lists(_record, min_size=1),
)
def test_another_unit_in_its_place_moves_it_by_no_more_than_twice_the_bound(rows: list[Any], other: Any) -> None:
    move = _vector(rows) - _vector([*rows[:-1], other])
    assert np.linalg.norm(move) <= 2 * math.sqrt(0.5) + 1e-9


def test_without_noise_it_is_the_mean_over_units() -> None:
    """Patients of 1, 2 and 1 records, texts of several tokens: by hand."""
    rows = [(1.0, 1.0, 0.5), (2.0, 1.0, 3.0), (4.0, 0.0, 2.0), (1.0, 0.0, 100.0)]
    told = noised(scores(rows), [np.array([0]), np.array([1, 2]), np.array([3])], EVEN, 0.0, Silent())
    assert told["examples"] == 3
    assert told["correct"] == pytest.approx(1 + 1 / 6 + 0)
    assert told["loss_sum"] == pytest.approx(0.5 + 5 / 6 + 2 * EVEN)


def test_the_noise_is_as_large_as_the_event_says() -> None:
    rows = [(1.0, float(i % 2), EVEN) for i in range(60)]
    groups = [np.array([i]) for i in range(60)]
    told = [
        noised(scores(rows), groups, EVEN, 4.0, RandomStream.seeded_not_private("release", number))
        for number in range(2000)
    ]
    for key, centre, unit in (("correct", 30.0, 1.0), ("loss_sum", 60 * EVEN, LOSS_BOUND * EVEN)):
        z = (np.array([each[key] for each in told]) - centre) / (4.0 * math.sqrt(0.5) * unit)
        assert stats.kstest(z, "norm").pvalue > 1e-3, key


def test_what_cannot_be_is_cut_off() -> None:
    """The server refuses more right answers than examples."""
    for number in range(50):
        told = noised(
            scores([(1.0, 1.0, 0.0)]), [np.array([0])], EVEN, 50.0, RandomStream.seeded_not_private("cut", number)
        )
        assert 0 <= told["correct"] <= told["examples"] == 1
        assert 0 <= told["loss_sum"] <= LOSS_BOUND * EVEN


@pytest.mark.parametrize(
    ("every", "rounds", "at", "left"),
    [(1, 5, 0, 6), (1, 5, 5, 1), (2, 5, 0, 4), (2, 5, 3, 2), (0, 5, 0, 2), (0, 5, 4, 1), (7, 5, 0, 2), (1, 5, 9, 1)],
)
def test_evaluations_are_counted_as_the_rounds_hold_them(every: int, rounds: int, at: int, left: int) -> None:
    assert evaluations_left(config(rounds=rounds, evaluate__every=every), at) == left


@pytest.mark.parametrize("every", [1, 2, 0])
def test_all_evaluations_of_a_run_together_keep_its_budget_and_use_it(every: int) -> None:
    settings, spent = config(evaluate__every=every), []
    due = [n for n in range(6) if n in (0, 5) or (every and n % every == 0)]
    for number in due:
        spent.append(release_event(settings, number, tuple(spent)))
    assert len(set(spent)) == 1
    assert 0.9 * 4.0 < epsilon(tuple(spent), 1e-5) <= 4.0


def test_the_evaluations_may_have_a_smaller_budget_of_their_own() -> None:
    event = release_event(config(evaluate__epsilon=0.5), 0, ())
    assert 0.45 < epsilon((Event(event.noise_multiplier, 1.0, 6),), 1e-5) <= 0.5
    with pytest.raises(UserError, match=r"evaluate\.epsilon 5 is above privacy\.epsilon 4"):
        config(evaluate__epsilon=5.0)
    with pytest.raises(UserError, match=r"needs privacy\.enabled"):
        config(evaluate__release="noised", privacy__enabled=False)


def test_what_was_spent_before_is_counted() -> None:
    settings = config()
    before = (Event(2.0, 1.0, 1),)
    event = release_event(settings, 0, before)
    assert event.noise_multiplier > release_event(settings, 0, ()).noise_multiplier
    assert epsilon((*before, Event(event.noise_multiplier, 1.0, 6)), 1e-5) <= 4.0
    with pytest.raises(UserError, match=r"privacy\.epsilon 4 .* cannot be reached"):
        release_event(settings, 0, (Event(0.5, 1.0, 4),))
