"""Which configuration to try next: at random at first, then where most is to be gained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, rankdata

from .front import expected_gain, front_of
from .space import Point, Space
from .surrogate import fit

#: Climbs of the gain, half from beside the front and half from anywhere, and the steps that each may take.
_CLIMBS, _STEPS = 10, 50
_DRAWS = 1000


def normal_scores(values: Sequence[float]) -> np.ndarray:
    """Where each value stands among all, as a standard normal number; equal values have one score.

    The paper's copula transform: a failed training is then no more than the last.
    """
    found: np.ndarray = norm.ppf((rankdata(values) - 0.5) / len(values))
    return found


def drawn(space: Space, tried: set[Point], random: np.random.Generator) -> Point | None:
    """A point at random that was not tried; None where a thousand draws found none."""
    for _ in range(_DRAWS):
        point = space.drawn(random)
        if point not in tried:
            return point
    return None


def chosen(
    space: Space, points: Sequence[Point], accuracies: Sequence[float], random: np.random.Generator
) -> Point | None:
    """The untried point with the highest expected gain that is found by climbing; None where there is none left.

    The paper's acquisition, noisy expected hypervolume improvement, averages over what the tried points' true values
    may be; here they are at their posterior means. What a point costs, the logarithm of how many numbers train, is
    known before a trial, so that the gain has a closed form.
    """
    tried = set(points)
    scores = normal_scores(accuracies)
    surrogate = fit(space.encoded(points), scores)
    costs = np.log2([space.numbers(point) for point in points])
    means, _ = surrogate.posterior(space.encoded(points))
    reference = (float(np.log2(space.most)) + 1.0, float(min(means.min(), scores.min())))

    def gains(candidates: Sequence[Point]) -> np.ndarray:
        cost = np.log2([space.numbers(candidate) for candidate in candidates])
        return expected_gain(cost, *surrogate.posterior(space.encoded(candidates)), costs, means, reference)

    front = front_of(costs, means)
    best: tuple[float, Point] | None = None
    for climb in range(_CLIMBS):
        at = points[front[int(random.integers(len(front)))]] if climb % 2 else drawn(space, tried, random)
        gain = -np.inf if at is None or at in tried else float(gains([at])[0])
        for _ in range(_STEPS if at is not None else 0):
            beside = [point for point in space.neighbours(at) if point not in tried]  # type: ignore[arg-type]
            if not beside:
                break
            found = gains(beside)
            if found.max() <= gain:
                break
            at, gain = beside[int(found.argmax())], float(found.max())
        if at is not None and at not in tried and (best is None or gain > best[0]):
            best = gain, at
    return best[1] if best else drawn(space, tried, random)
