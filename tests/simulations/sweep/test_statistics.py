"""Means and intervals against a table of Student's distribution, and against how often they hold the truth."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy.stats import t as student

from fedgraft.simulations.sweep.statistics import Estimate, estimate

#: 97.5 % points of Student's t by degrees of freedom, from the printed table.
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_interval_is_that_of_the_printed_table(freedom):
    draw = random.Random(freedom)
    values = [draw.gauss(0.6, 0.05) for _ in range(freedom + 1)]
    found = estimate(values)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    assert found.mean == pytest.approx(mean, rel=1e-12) and found.count == freedom + 1
    assert found.half == pytest.approx(TABLE[freedom] * spread / math.sqrt(freedom + 1), rel=2e-4)
    low, high = student.interval(0.95, freedom, mean, statistics.stdev(values) / math.sqrt(len(values)))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)


def test_it_holds_the_truth_in_95_of_100_draws():
    """4,000 draws: the share has a standard deviation of 0.0034; four of them are allowed."""
    draw = random.Random(1)
    held = 0
    for _ in range(4000):
        found = estimate(draw.gauss(1.0, 2.0) for _ in range(5))
        held += found.low <= 1.0 <= found.high
    assert abs(held / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_seed_tells_no_interval():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert not estimate([0.5]).apart(estimate([9.0, 9.0]))


def test_what_is_not_known_is_left_out():
    assert estimate([None, 0.5, float("nan"), 0.7]).count == 2
    assert estimate([None]) is None and estimate([]) is None


def test_intervals_are_apart_when_they_do_not_meet():
    near, far, wide = Estimate(1.0, 0.1, 3), Estimate(1.5, 0.1, 3), Estimate(1.5, 0.5, 3)
    assert near.apart(far) and far.apart(near)
    assert not near.apart(wide) and not wide.apart(near)
