"""What is tried next."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fedgraft.simulations.search.choosing import chosen, drawn, normal_scores
from fedgraft.simulations.search.front import expected_gain
from fedgraft.simulations.search.space import MODULES, Point, Space
from fedgraft.simulations.search.surrogate import fit

SMALL = Space(8, {0: 1, 1: 1}, {0: 32, 1: 32}, {"serial": (0, 1, 2, 8), "parallel": (0, 1, 4), "prefix": (0,)})
POINTS = [
    Point(layers, *sizes)
    for layers in ((0,), (1,), (0, 1))
    for sizes in product(*(SMALL.sizes[module] for module in MODULES))
    if any(sizes)
]


def accuracy(point: Point) -> float:
    """Layer 1 is what matters, then the serial adapter; all else is for nothing."""
    return 0.5 + 0.3 * (1 in point.layers) + 0.02 * min(point.serial, 2)


def test_scores_are_the_quantiles_of_ranks() -> None:
    found = normal_scores([3.0, 1.0, 1.0, 100.0])
    # Ranks 3, 1.5, 1.5 and 4 of 4.
    assert found == pytest.approx([0.3186393639, -0.6744897502, -0.6744897502, 1.1503493804], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_next_point_is_the_best_of_all_that_were_not_tried(seed: int) -> None:
    random = np.random.default_rng(seed)
    tried = [POINTS[at] for at in random.permutation(len(POINTS))[:8]]
    accuracies = [accuracy(point) for point in tried]
    rest = [point for point in POINTS if point not in tried]
    scores = normal_scores(accuracies)
    process = fit(SMALL.encoded(tried), scores)
    means, _ = process.posterior(SMALL.encoded(tried))

    def cost(points: list[Point]) -> np.ndarray:
        return np.log2([SMALL.numbers(point) for point in points])

    reference = (float(cost(POINTS).max()) + 1.0, float(min(means.min(), scores.min())))
    gains = expected_gain(cost(rest), *process.posterior(SMALL.encoded(rest)), cost(tried), means, reference)
    found = chosen(SMALL, tried, accuracies, np.random.default_rng(seed))
    assert found is not None and gains[rest.index(found)] == pytest.approx(gains.max(), rel=1e-9)


def test_the_search_finds_the_front_in_less_than_half_of_the_trials() -> None:
    best = max(accuracy(point) for point in POINTS)
    cheapest = min(SMALL.numbers(point) for point in POINTS if accuracy(point) == best)
    tried = [POINTS[at] for at in np.random.default_rng(1).permutation(len(POINTS)) if accuracy(POINTS[at]) < best][:5]
    for trial in range(9):
        found = chosen(SMALL, tried, [accuracy(point) for point in tried], np.random.default_rng(trial))
        assert found is not None
        tried.append(found)
    assert min(SMALL.numbers(p) for p in tried if accuracy(p) == best) == cheapest
    assert 2 * len(tried) < len(POINTS)


def test_nothing_is_tried_twice_and_the_end_is_told() -> None:
    random = np.random.default_rng(0)
    assert chosen(SMALL, POINTS, [accuracy(point) for point in POINTS], random) is None
    assert drawn(SMALL, set(POINTS), random) is None
    assert drawn(SMALL, set(POINTS[1:]), random) == POINTS[0]
    last = chosen(SMALL, POINTS[1:], [accuracy(point) for point in POINTS[1:]], random)
    assert last == POINTS[0]
