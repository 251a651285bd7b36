"""Dealing records to sites: evenly, with each class skewed by a Dirichlet draw, to sites of given sizes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ..core.config import SizesConfig
from ..core.errors import UserError

#: Proportional fitting ends when every site's size is met to this part of it, or after so many turns.
_FITTED, _TURNS = 1e-6, 500


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


def site_shares(sizes: SizesConfig, sites: int, rng: np.random.Generator) -> np.ndarray:
    """Share of all records that each site is to have by ``sizes.law``, shape (sites,), summing to 1.

    Which site is large under the power law is drawn. Raises :class:`UserError` for another number of fractions.
    """
    if sizes.law == "fractions":
        if len(sizes.fractions) != sites:
            raise UserError(f"data.sizes.fractions: {len(sizes.fractions)} fractions for {sites} sites; give one each")
        weights = np.array(sizes.fractions)
    elif sizes.law == "power":
        weights = rng.permutation(np.arange(1, sites + 1) ** -sizes.exponent)
    elif sizes.law == "lognormal":
        weights = np.exp(sizes.sigma * rng.standard_normal(sites))
    else:
        weights = np.ones(sites)
    return weights / weights.sum()


def fit(shares: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``shares`` (classes, sites), changed as little as can be so that site i has ``sizes[i]`` of all records.

    ``counts``: records of each class. By iterative proportional fitting (Deming and Stephan 1940): rows sum to 1, and
    counts @ result = sizes * counts.sum(). Where shares are so skewed that it cannot be met, as near as it gets.
    """
    # A share of exactly 0 could never grow; one this small gives nobody a record by itself.
    table = np.maximum(shares, 1e-12) * counts[:, None]
    rows, columns = counts.astype(np.float64), sizes * counts.sum()
    for _ in range(_TURNS):
        table *= columns / table.sum(0)
        table *= (rows / np.maximum(table.sum(1), np.finfo(float).tiny))[:, None]
        if np.abs(table.sum(0) - columns).max() <= _FITTED * columns.max():
            break
    totals = table.sum(1, keepdims=True)
    return np.divide(table, totals, out=np.tile(sizes, (len(counts), 1)), where=totals > 0)


def deal_sized(labels: np.ndarray, shares: np.ndarray, minimum: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Like :func:`deal`, for sites that may be smaller than there are classes.

    A site gets its share of each class rounded up or down, by chance and right on average: cut at one phase for all
    classes, a few sites would get one of everything and the others nothing. Sites with less than ``minimum`` then get
    records from the largest. Raises :class:`UserError` where there are too few.
    """
    sites = shares.shape[1]
    if len(labels) < minimum * sites:
        raise UserError(
            f"{len(labels)} patients or records are too few for {sites} sites of {minimum} or more; use fewer sites, "
            "or lower data.sizes.minimum"
        )
    owner = np.empty(len(labels), dtype=np.int64)
    for label in range(shares.shape[0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.floor(np.cumsum(shares[label]) * len(members) + rng.random()).astype(np.int64)
        ends[-1] = len(members)
        owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    dealt = grouped(owner, sites)
    largest = [(-len(part), site) for site, part in enumerate(dealt)]
    heapq.heapify(largest)
    for site in [site for site, part in enumerate(dealt) if len(part) < minimum]:
        while len(dealt[site]) < minimum:
            # A receiver's entry is out of date, but never first: while one has too few, the largest has enough.
            _, giver = heapq.heappop(largest)
            moved = int(rng.integers(len(dealt[giver])))
            dealt[site] = np.append(dealt[site], dealt[giver][moved])
            dealt[giver] = np.delete(dealt[giver], moved)
            heapq.heappush(largest, (-len(dealt[giver]), giver))
    return [np.sort(part) for part in dealt]


def grouped(owners: np.ndarray, sites: int) -> list[np.ndarray]:
    """Indices of each owner 0, 1, ..., ``sites`` - 1, ascending. An owner below 0 has none of them."""
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.searchsorted(owners[order], np.arange(sites + 1)))[1:-1]


def deal_patients(records: int, low: int, high: int, rng: np.random.Generator) -> Sequence[int]:
    """A patient number for each record, in a random order: patients have ``low`` to ``high`` records, uniformly."""
    sizes: list[int] = []
    while sum(sizes) < records:
        sizes.append(int(rng.integers(low, high + 1)))
    owners = np.repeat(np.arange(len(sizes)), sizes)[:records]
    return rng.permutation(owners).tolist()
