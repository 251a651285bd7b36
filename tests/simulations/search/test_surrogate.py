"""The Gaussian process against dense formulas, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedgraft.simulations.search.surrogate import Surrogate, fit, log_posterior


def kernel(a: np.ndarray, b: np.ndarray, inverse: np.ndarray, scale: float) -> float:
    r = math.sqrt(sum(w * (p - q) ** 2 for w, p, q in zip(inverse, a, b, strict=True)))
    return scale * (1 + math.sqrt(5) * r + 5 / 3 * r * r) * math.exp(-math.sqrt(5) * r)


def gram(a: np.ndarray, b: np.ndarray, inverse: np.ndarray, scale: float) -> np.ndarray:
    return np.array([[kernel(p, q, inverse, scale) for q in b] for p in a])


@pytest.fixture
def process() -> Surrogate:
    random = np.random.default_rng(1)
    return Surrogate(random.random((7, 3)), random.normal(size=7), np.array([0.5, 3.0, 0.01]), 1.7, 0.2, 0.3)


def test_the_posterior_is_that_of_the_inverse_covariance(process: Surrogate) -> None:
    at = np.random.default_rng(2).random((4, 3))
    means, deviations = process.posterior(at)
    inverted = np.linalg.inv(gram(process.x, process.x, process.inverse, process.scale) + (0.2 + 1e-6) * np.eye(7))
    across = gram(at, process.x, process.inverse, process.scale)
    for row in range(4):
        mean = 0.3 + across[row] @ inverted @ (process.y - 0.3)
        variance = process.scale - across[row] @ inverted @ across[row]
        # The root in the kernel has 1e-12 added.
        assert means[row] == pytest.approx(mean, abs=1e-9)
        assert deviations[row] == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_the_log_posterior_is_the_likelihood_by_the_priors(process: Surrogate) -> None:
    """But for a constant, and with the Jacobian of the logarithms."""

    def dense(unknown: np.ndarray) -> float:
        mean, (shrinkage, scale, noise), inverse = unknown[0], np.exp(unknown[1:4]), np.exp(unknown[4:])
        covariance = gram(process.x, process.x, inverse, scale) + (noise + 1e-6) * np.eye(7)
        total = stats.multivariate_normal.logpdf(process.y, np.full(7, mean), covariance)
        total += sum(stats.halfcauchy.logpdf(each, scale=shrinkage) for each in inverse)
        total += stats.halfcauchy.logpdf(shrinkage, scale=0.1)
        total += stats.gamma.logpdf(scale, 2, scale=1 / 0.15) + stats.gamma.logpdf(noise, 0.9, scale=1 / 10)
        return float(total + stats.norm.logpdf(mean) + unknown[1:].sum())

    def own(unknown: np.ndarray) -> float:
        x, y = torch.from_numpy(process.x), torch.from_numpy(process.y)
        return float(log_posterior(torch.from_numpy(unknown), x, y))

    random = np.random.default_rng(3)
    first, second = random.normal(size=7), random.normal(size=7)
    assert own(first) - own(second) == pytest.approx(dense(first) - dense(second), abs=1e-8)


def test_a_fit_finds_the_input_that_matters() -> None:
    random = np.random.default_rng(4)
    x = random.random((25, 8))
    y = np.sin(5 * x[:, 2])
    y = (y - y.mean()) / y.std()
    found = fit(x, y)
    assert found.inverse.argmax() == 2
    assert np.delete(found.inverse, 2).max() < found.inverse[2] / 20
    at = random.random((10, 8))
    want = (np.sin(5 * at[:, 2]) - np.sin(5 * x[:, 2]).mean()) / np.sin(5 * x[:, 2]).std()
    assert np.abs(found.posterior(at)[0] - want).max() < 0.2


def test_equal_rows_with_equal_values_can_be_fitted() -> None:
    found = fit(np.ones((4, 2)), np.zeros(4))
    means, deviations = found.posterior(np.ones((1, 2)))
    assert abs(means[0]) < 0.1 and np.isfinite(deviations).all()
