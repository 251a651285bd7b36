"""Two aims at once, against brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fedgraft.simulations.search.front import expected_gain, front_of


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether ``a`` is no worse than ``b`` (cost, value) in either, and better in one."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def area(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """What the points rule of the plane up to the reference, cell by cell of the grid through all of them."""
    inside = [(cost, value) for cost, value in points if cost < reference[0] and value > reference[1]]
    columns = sorted({cost for cost, _ in inside} | {reference[0]})
    rows = sorted({value for _, value in inside} | {reference[1]})
    found = 0.0
    for left, right in pairwise(columns):
        for low, high in pairwise(rows):
            if any(cost <= left and value >= high for cost, value in inside):
                found += (right - left) * (high - low)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_dominates(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Whole numbers, so that many are equal.
    points = [(float(a), float(b)) for a, b in random.integers(0, 6, (12, 2))]
    found = front_of([cost for cost, _ in points], [value for _, value in points])
    best = {point for point in points if not any(dominates(other, point) for other in points)}
    assert {points[at] for at in found} == best and len(found) == len(best)
    assert [points[at][0] for at in found] == sorted(points[at][0] for at in found)
    assert all(points.index(points[at]) == at for at in found), "of equal points the first"


def test_nothing_has_no_front() -> None:
    assert front_of([], []) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_gain_is_the_integral_of_what_the_area_grows_by(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [(float(a), float(b)) for a, b in random.normal(size=(6, 2))]
    reference = (1.5, -1.2)
    cost, mean, deviation = random.normal(size=4), random.normal(size=4), random.uniform(0.2, 1.0, 4)
    costs, values = (np.array(column) for column in zip(*points, strict=True))
    found = expected_gain(cost, mean, deviation, costs, values, reference)
    before = area(points, reference)
    for at in range(4):
        drawn = np.linspace(mean[at] - 8 * deviation[at], mean[at] + 8 * deviation[at], 2001)
        density = np.exp(-(((drawn - mean[at]) / deviation[at]) ** 2) / 2) / (deviation[at] * np.sqrt(2 * np.pi))
        grown = [area([*points, (float(cost[at]), float(value))], reference) - before for value in drawn]
        want = float(np.sum(np.array(grown) * density) * (drawn[1] - drawn[0]))
        # The rule of rectangles is off by about the square of the step, 8e-3 deviations, at the front's corners.
        assert found[at] == pytest.approx(want, abs=3e-5)


def test_a_candidate_beyond_the_reference_gains_nothing() -> None:
    gain = expected_gain(
        np.array([3.0]), np.array([5.0]), np.array([1.0]), np.array([1.0]), np.array([0.0]), (2.0, -1.0)
    )
    assert gain.tolist() == [0.0]
