"""Records of one's own: one table that is dealt to the sites, or a file for each site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...client.data import SiteData, load_site, read_records, split
from ...core.config import RunConfig
from ...core.records import read_column
from ..dealing import by_patient, deal_units, records_of, require_dealt


def dealt(config: RunConfig) -> Callable[[int], SiteData]:
    """Each site's data, by its number. Raises :class:`UserError` that names the site or file."""
    if not config.data.path:
        sites = config.data.sites
        return lambda number: load_site(config, sites[number].name, sites[number].path)
    records = read_records(config.data.path, config)
    rng = np.random.default_rng([config.seed, 11])
    owners, first = by_patient(records.patients, len(records))
    labels = records.labels if records.labels is not None else np.zeros(len(records), dtype=np.int64)

    def column(name: str) -> Sequence[Any]:
        values = read_column(config.data.path, name, "data.partition_options.partition_by")
        return [values[index] for index in first]

    deal = deal_units(config, labels[first], int(labels.max()) + 1, column, rng)
    mine = records_of(deal.units, owners)
    for site, indices in zip(config.site_names, mine, strict=True):
        require_dealt(site, len(indices), config.data.path)
    return lambda number: split(records.take(mine[number]), config, config.site_names[number])
