"""How well chances of labels tell what will be right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Accuracy; the mean -log p(label), p at least 1e-12; the expected calibration error over 15 bins of confidence."""

    accuracy: float
    loss: float
    error: float


def calibration(chances: np.ndarray, labels: np.ndarray) -> Calibration:
    """Of ``chances`` (n, C) for ``labels`` (n,)."""
    sure, right = chances.max(1), chances.argmax(1) == labels
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, right - sure, _BINS)
    loss = -np.log(np.maximum(chances[np.arange(len(labels)), labels], 1e-12)).mean()
    return Calibration(float(right.mean()), float(loss), float(np.abs(gaps).sum() / len(labels)))
