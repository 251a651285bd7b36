"""The geometric median of the sites' changes, by weights that are found from their distances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from ...core.update import Update
from ..aggregator import Options, strategy
from .distances import gram
from .judging import Judge, RobustOptions, Sent


def median_weights(
    products: np.ndarray, alphas: np.ndarray, *, iterations: int, smoothing: float, tolerance: float = 1e-10
) -> np.ndarray:
    """The weights w, summing to 1, of the smoothed geometric median v = sum w_k D_k, by Weiszfeld's iteration.

    ``products`` (K, K): <D_i, D_j>; ``alphas``: the weights of the distances in the sum that v minimises. All that is
    ever needed of v is |v - D_k|^2 = w^T G w - 2 (G w)_k + G_kk. Stops when no weight moves by more than ``tolerance``.
    """
    weights = alphas / alphas.sum()
    for _ in range(iterations):
        seen = products @ weights
        away = np.sqrt(np.maximum(weights @ seen - 2 * seen + np.diag(products), 0.0))
        fresh = alphas / np.maximum(away, smoothing)
        fresh /= fresh.sum()
        moved, weights = np.abs(fresh - weights).max(), fresh
        if moved <= tolerance:
            break
    return weights


class GeometricMedianOptions(RobustOptions):
    """``iterations`` of Weiszfeld at most; ``smoothing``: the least distance that is divided by."""

    iterations: int = Field(1000, ge=1, description="steps of Weiszfeld's iteration at most")
    smoothing: float = Field(1e-6, gt=0, description="the least distance that a weight is divided by")


@strategy("geometric-median")
class GeometricMedian(Judge):
    """RFA: v = argmin_v sum_k |v - D_k|, D_k = dW_k - dW_0, which fewer than half of the weight cannot carry away.

    The median is a weighted mean, v = sum w_k D_k, with w_k proportional to 1 / max(nu, |v - D_k|). The updates are
    handed on with these weights: exactly the geometric median of dW where ``then`` is exact (ffa, fedex, flexlora at
    full rank), a mean of factors with the median's weights for fedit. Nothing is thrown away: an update c times as far
    off has a c-th of the weight, and so the same pull. Source: Pillutla et al. 2019, "Robust Aggregation for Federated
    Learning", arXiv 1912.13445, algorithm 2 (nu = 1e-6; three steps there, to convergence here).
    """

    summary = "weights 1 / |v - D_k|, v the geometric median of the changes of dW"
    equation = "v = sum w_k D_k, w_k = c / max(nu, |v - D_k|), sum w_k = 1, D_k = s_k B_k A_k - s B_0 A_0"
    source = "Pillutla et al. 2019, arXiv 1912.13445"
    Options: ClassVar[type[Options]] = GeometricMedianOptions

    def judged(self, sent: list[Sent]) -> Iterable[Update]:
        weights = median_weights(
            gram([one.change for one in sent]),
            np.array([self.weight(one.update) for one in sent]),
            iterations=self.options.iterations,
            smoothing=self.options.smoothing,
        )
        return [replace(one.update, weight=float(w)) for one, w in zip(sent, weights, strict=True)]
