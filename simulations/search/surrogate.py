"""What the trials so far say of a configuration that was not tried: a Gaussian process that few inputs matter to.

The paper's surrogate is SAASBO's (Eriksson & Jankowiak 2021, arXiv 2103.00229): a prior by which most inverse length
scales are all but zero, sampled with NUTS. Here is the same prior, a Matern 5/2 kernel and the same noise, at their
mode in place of samples: NUTS and the libraries that bring it are heavy for a fit that a few trials need each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

#: Added to the diagonal, so that equal rows have a factor.
_JITTER = 1e-6
#: Half-Cauchy scale of the global shrinkage, as SAASBO has it.
_SHRINKAGE = 0.1
_ROUNDS = 200


@dataclass(frozen=True)
class Surrogate:
    """A fitted process: rows ``x`` (n, d), values ``y`` (n,), and what was found for them.

    ``inverse`` (d,): the squared inverse length scales; ``scale``: the variance of the function; ``noise``: of a value
    around it; ``mean``: far away from every row.
    """

    x: np.ndarray
    y: np.ndarray
    inverse: np.ndarray
    scale: float
    noise: float
    mean: float

    def posterior(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the function, without noise, at rows ``at`` (m, d): two of (m,)."""
        factor = cholesky(self._covariance(self.x, self.x) + (self.noise + _JITTER) * np.eye(len(self.x)), lower=True)
        across = self._covariance(self.x, at)
        means = self.mean + across.T @ cho_solve((factor, True), self.y - self.mean)
        known = solve_triangular(factor, across, lower=True)
        return means, np.sqrt(np.clip(self.scale - (known**2).sum(0), 0.0, None))

    def _covariance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found: np.ndarray = matern(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(self.inverse)).numpy()
        return self.scale * found


def matern(a: torch.Tensor, b: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """(1 + sqrt(5) r + 5/3 r^2) exp(-sqrt(5) r), r^2 = sum_i inverse_i (a_i - b_i)^2; (n, d), (m, d) -> (n, m)."""
    squared = ((a[:, None] - b[None]) ** 2 * inverse).sum(-1)
    # The root has no gradient at zero.
    r = torch.sqrt(5 * squared + 1e-12)
    return (1 + r + r**2 / 3) * torch.exp(-r)


def log_posterior(unknown: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of ``unknown`` (d + 4,): mean, and the logarithms of shrinkage, scale, noise and ``inverse``; less a constant.

    inverse_i ~ HalfCauchy(shrinkage), shrinkage ~ HalfCauchy(0.1), scale ~ Gamma(2, 0.15), noise ~ Gamma(0.9, 10),
    mean ~ N(0, 1), each density with the logarithm's Jacobian, without which the mode would lie at a pole.
    """
    mean, logs = unknown[0], unknown[1:]
    shrinkage, scale, noise, inverse = logs[0].exp(), logs[1].exp(), logs[2].exp(), logs[3:].exp()
    covariance = scale * matern(x, x, inverse) + (noise + _JITTER) * torch.eye(len(x), dtype=x.dtype)
    factor = torch.linalg.cholesky(covariance)
    rest = torch.linalg.solve_triangular(factor, (y - mean)[:, None], upper=False)
    likelihood = -0.5 * rest.square().sum() - factor.diagonal().log().sum()
    sparse = (logs[3:] - logs[0] - torch.log1p((inverse / shrinkage) ** 2)).sum()
    whole = logs[0] - torch.log1p((shrinkage / _SHRINKAGE) ** 2)
    return likelihood + sparse + whole + (2 * logs[1] - 0.15 * scale) + (0.9 * logs[2] - 10 * noise) - mean**2 / 2


def fit(x: np.ndarray, y: np.ndarray) -> Surrogate:
    """The process at the mode of :func:`log_posterior`, the best of two climbs; ``y`` about standard normal."""
    rows, values = torch.from_numpy(np.asarray(x, dtype=float)), torch.from_numpy(np.asarray(y, dtype=float))

    def below(at: np.ndarray) -> tuple[float, np.ndarray]:
        unknown = torch.from_numpy(at).requires_grad_(True)
        with torch.enable_grad():
            value = -log_posterior(unknown, rows, values)
            (slope,) = torch.autograd.grad(value, unknown)
        return value.item(), slope.numpy()

    width = x.shape[1]
    bounds = [(-3.0, 3.0), *[(math.log(1e-4), math.log(1e3))] * (width + 3)]
    climbs = []
    for inverse in (0.1, 1.0):
        start = np.log(np.array([1.0, _SHRINKAGE, 1.0, 0.1, *[inverse] * width]))
        options = {"maxiter": _ROUNDS}
        climbs.append(minimize(below, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options))
    best = min(climbs, key=lambda climb: climb.fun).x
    scale, noise = np.exp(best[2:4]).tolist()
    return Surrogate(rows.numpy(), values.numpy(), np.exp(best[4:]), scale, noise, float(best[0]))
