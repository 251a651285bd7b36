"""Two aims at once: the points that no other beats, the area that they rule, and what a new one would add to it.

A point has a cost, which shall be low, and a value, which shall be high.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm


def front_of(costs: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> list[int]:
    """Which points no other dominates, by rising cost; of equal ones the first."""
    found: list[int] = []
    for at in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if not found or values[at] > values[found[-1]]:
            found.append(at)
    return found


def expected_gain(
    cost: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    costs: np.ndarray,
    values: np.ndarray,
    reference: tuple[float, float],
) -> np.ndarray:
    """By how much each candidate is expected to enlarge the area between the points and ``reference``, (m,).

    ``cost`` (m,) is known of a candidate, its value is normal with ``mean`` and ``deviation``, each (m,); ``costs`` and
    ``values`` (n,) are of the points there are; ``reference`` is the (cost, value) that a point must beat. At each cost
    from its own to the reference's, a candidate adds what it is above the best point that costs no more; the expected
    hypervolume improvement (Emmerich et al. 2006) is thus a sum over the front's steps of their widths by the expected
    improvement over their heights. Nothing is sampled.
    """
    front = [i for i in front_of(costs, values) if costs[i] < reference[0] and values[i] > reference[1]]
    starts = np.array([-np.inf, *(costs[i] for i in front)])
    ends = np.array([*starts[1:], reference[0]])
    heights = np.array([reference[1], *(values[i] for i in front)])
    widths = np.clip(ends - np.maximum(starts, cost[:, None]), 0.0, None)
    above, spread = mean[:, None] - heights, np.maximum(deviation, 1e-12)[:, None]
    by = above / spread
    gain: np.ndarray = (widths * (above * norm.cdf(by) + spread * norm.pdf(by))).sum(1)
    return gain
