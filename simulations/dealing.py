"""How the configuration deals one table of records to the sites. All records of a patient go to one site.

A deal looks at everybody's labels, and one patient more may move the others to other sites: it belongs to the made-up
world of a simulation, and no promise of a site covers it. What a site promises is about the records that it was dealt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.config import RunConfig
from ..core.errors import UserError
from .partition import class_shares, deal, deal_sized, fit, grouped, site_shares
from .partitioners import check_partition, partition


@dataclass(frozen=True)
class Deal:
    """What each site gets: indices of units (patients, or records where none are named), ascending.

    ``shares``: of each class, the part that each site has, shape (classes, sites).
    """

    units: list[np.ndarray]
    shares: np.ndarray
    sized: bool

    def held_out(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Indices of the held-out records of each site, where the source keeps them apart: of each class its share."""
        return deal_sized(labels, self.shares, 1, rng) if self.sized else deal(labels, self.shares, rng)


def deal_units(
    config: RunConfig,
    labels: np.ndarray,
    classes: int,
    column: Callable[[str], Sequence[Any]],
    rng: np.random.Generator,
) -> Deal:
    """Deal units with ``labels`` (0 to ``classes`` - 1) as `data.partition`, `data.alpha` and `data.sizes` say.

    ``column``: a column of the table by name, one value a unit. Raises :class:`UserError` that names the key.
    """
    data, sites = config.data, len(config.site_names)
    options = check_partition(data.partition, data.partition_options)
    if options is not None:
        units = partition(data.partition, options, sites=sites, labels=labels, alpha=data.alpha, column=column, rng=rng)
        counts = np.stack([np.bincount(labels[part], minlength=classes) for part in units], axis=1)
        totals = counts.sum(1, keepdims=True)
        return Deal(units, np.divide(counts, totals, out=np.full(counts.shape, 1 / sites), where=totals > 0), True)
    shares = class_shares(classes, sites, data.alpha if data.partition == "dirichlet" else None, rng)
    if not data.sizes.law:
        return Deal(deal(labels, shares, rng), shares, False)
    shares = fit(shares, np.bincount(labels, minlength=classes), site_shares(data.sizes, sites, rng))
    return Deal(deal_sized(labels, shares, data.sizes.minimum, rng), shares, True)


def by_patient(patients: Sequence[object] | None, records: int) -> tuple[np.ndarray, np.ndarray]:
    """The unit of each record, numbered as they come, and the first record of each unit."""
    if patients is None:
        return np.arange(records), np.arange(records)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(patients))}
    owners = np.array([numbers[key] for key in patients], dtype=np.int64)
    return owners, np.unique(owners, return_index=True)[1]


def records_of(units: Sequence[np.ndarray], owners: np.ndarray) -> list[np.ndarray]:
    """Indices of the records of each site, ascending; ``owners``: the unit of each record."""
    site_of = np.full(int(owners.max(initial=-1)) + 1, -1, dtype=np.int64)
    for site, mine in enumerate(units):
        site_of[mine] = site
    return grouped(site_of[owners], len(units))


def require_dealt(site: str, records: int, where: str) -> None:
    """Raise :class:`UserError` for a site that went away empty-handed."""
    if not records:
        raise UserError(
            f"site {site} got no records of {where}; give data.sizes a law with a minimum, raise data.alpha, or use "
            "fewer sites"
        )
