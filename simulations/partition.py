"""Dealing records to sites: evenly, or with each class skewed by a Dirichlet draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def class_shares(classes: int, sites: int, alpha: float | None, rng: np.random.Generator) -> np.ndarray:
    """Share of each class that each site gets, shape (classes, sites), rows summing to 1.

    ``alpha`` None: equal shares. Else each row is a draw from Dirichlet(alpha, ..., alpha), the label skew of Hsu et
    al. 2019 (arXiv 1909.06335).
    """
    if alpha is None:
        return np.full((classes, sites), 1.0 / sites)
    return rng.dirichlet(np.full(sites, alpha), size=classes)


def deal(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of each site's records: every class is shuffled and cut by its row of ``shares``."""
    sites: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
    for label in range(shares.shape[0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(shares[label])[:-1] * len(members)).astype(int)
        for site, part in enumerate(np.split(members, cuts)):
            sites[site].append(part)
    return [np.sort(np.concatenate(parts)) for parts in sites]


def deal_patients(records: int, low: int, high: int, rng: np.random.Generator) -> Sequence[int]:
    """A patient number for each record, in a random order: patients have ``low`` to ``high`` records, uniformly."""
    sizes: list[int] = []
    while sum(sizes) < records:
        sizes.append(int(rng.integers(low, high + 1)))
    owners = np.repeat(np.arange(len(sizes)), sizes)[:records]
    return rng.permutation(owners).tolist()
