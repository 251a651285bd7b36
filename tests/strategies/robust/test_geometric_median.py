"""The geometric median by Weiszfeld's weights against a numeric minimiser on dense vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from fedgraft.core.adapter import AdapterState
from fedgraft.strategies.robust.geometric_median import median_weights


def _minimiser(points: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    def cost(v: np.ndarray) -> float:
        return float(alphas @ np.linalg.norm(points - v, axis=1))

    def slope(v: np.ndarray) -> np.ndarray:
        away = v - points
        return (alphas / np.linalg.norm(away, axis=1)) @ away

    found = minimize(cost, points.mean(axis=0), jac=slope, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    return found.x


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_give_the_point_of_least_distance(seed: int) -> None:
    random = np.random.default_rng(seed)
    points, alphas = random.standard_normal((8, 5)), random.uniform(0.5, 2.0, 8)
    weights = median_weights(points @ points.T, alphas, iterations=5000, smoothing=1e-9, tolerance=1e-14)
    assert weights.sum() == pytest.approx(1) and (weights > 0).all()
    # BFGS stops where the slope is below 1e-10 of order-one distances.
    np.testing.assert_allclose(weights @ points, _minimiser(points, alphas), atol=1e-6)


def test_on_a_line_it_is_the_median() -> None:
    points = np.array([[0.0], [1.0], [5.0], [6.0], [1000.0]])
    weights = median_weights(points @ points.T, np.ones(5), iterations=10000, smoothing=1e-9, tolerance=0)
    assert (weights @ points)[0] == pytest.approx(5.0, abs=1e-3)


def test_with_one_factor_frozen_the_result_is_the_geometric_median_of_dw(bench: Any) -> None:
    """FFA averages dW exactly, so what comes out is the point itself, not an approximation by factors."""
    spec = bench.spec.with_policy("freeze", lambda tensor: tensor.role == "lora_A")
    start = bench.state(99, spec=spec)
    sent = [bench.near(start, seed).only(spec.select("share")) for seed in range(9)]
    got = bench.aggregate("geometric-median", sent, start, weights=[1e6, *[1.0] * 8]).filled_from(start)
    points = np.stack([bench.dense(state.filled_from(start)) for state in sent])
    want = _minimiser(points, np.ones(9))
    assert np.linalg.norm(bench.dense(got) - want) < 1e-5 * np.linalg.norm(want - bench.dense(start))


def test_a_lie_of_any_size_moves_it_no_farther(bench: Any) -> None:
    """The pull of a site does not grow with its distance; a mean is carried away."""
    spec = bench.spec.with_policy("freeze", lambda tensor: tensor.role == "lora_A")
    start = bench.state(99, spec=spec)
    honest = [bench.near(start, seed).only(spec.select("share")) for seed in range(8)]
    base = start.only(spec.select("share"))
    away = []
    for attack in (1e2, 1e4, 1e6):
        lies = [base + attack * (bench.near(start, 77).only(base) - base)] * 2
        got = bench.aggregate("geometric-median", [*lies, *honest], start)
        away.append(float(np.linalg.norm(bench.dense(got.filled_from(start)) - bench.dense(start))))
    spread = max(float(np.linalg.norm(bench.dense(s.filled_from(start)) - bench.dense(start))) for s in honest)
    assert max(away) < spread
    assert away[1] == pytest.approx(away[2], rel=1e-2)


def test_equal_updates_are_their_own_median(bench: Any) -> None:
    one = bench.sent(1)[0]
    bench.close(bench.aggregate("geometric-median", [one] * 3), one)
    bench.close(bench.aggregate("geometric-median", [one]), one)
    still: AdapterState = bench.start()
    bench.close(bench.aggregate("geometric-median", [still] * 2), still)


def test_records_count_where_that_is_asked_for(bench: Any) -> None:
    sent = bench.sent(2)
    far = bench.aggregate("geometric-median", sent, weights=[100.0, 1.0], weigh=True)
    even = bench.aggregate("geometric-median", sent, weights=[100.0, 1.0])
    assert (far - sent[0]).norm() < 0.01 * (sent[1] - sent[0]).norm()
    bench.close(even, 0.5 * (sent[0] + sent[1]), rtol=1e-9)
