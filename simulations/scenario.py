"""A scenario: the configuration of a simulated federation, by file or by name, and the data of its sites."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..client.data import SiteData, load_site, read_records, split
from ..core.config import RunConfig, SimulationConfig, load_config
from ..core.errors import UserError
from . import baselines, icd10
from .partition import class_shares, deal

_FOLDER = Path(__file__).parent / "scenarios"


def named() -> list[str]:
    """Names of the scenarios that come with fedgraft."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_scenario(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration called ``name`` (a TOML file, or a scenario that comes with fedgraft), checked and completed.

    Raises :class:`UserError` in one line.
    """
    path = Path(name)
    if not path.suffix and not path.exists() and os.sep not in name:
        path = _FOLDER / f"{name}.toml"
        if not path.exists():
            near = difflib.get_close_matches(name, named(), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(named())}"
            raise UserError(f"{name}: no such file and no scenario of that name; {hint}")
    return complete(load_config(path, overrides))


def complete(config: RunConfig) -> RunConfig:
    """Fill in what the data source knows (the label set, where none is configured) and what a baseline changes."""
    if config.data.source not in _SOURCES:
        raise UserError(f"data.source `{config.data.source}` is unknown; there are {', '.join(sorted(_SOURCES))}")
    if config.data.source == "icd10" and not config.task.labels:
        config = config.model_copy(update={"task": config.task.model_copy(update={"labels": icd10.labels()})})
    return baselines.applied(config)


def site_data(config: RunConfig) -> dict[str, SiteData]:
    """Every site's data, by name. Raises :class:`UserError` that names the site or file."""
    if config.simulation.pooled:
        data = config.data.model_copy(update={"sites": config.simulation.pooled})
        apart = config.model_copy(update={"data": data, "simulation": SimulationConfig()})
        return {baselines.POOLED: baselines.pool(site_data(apart).values())}
    sites = _SOURCES[config.data.source](config)
    for site, data in sites.items():
        if not len(data.held_out):
            raise UserError(f"site {site} has no held-out records; give it more data or raise data.test_fraction")
    return sites


@lru_cache(maxsize=2)
def _from_files(config: RunConfig) -> dict[str, SiteData]:
    if config.data.path:
        return _from_one_file(config)
    return {site.name: load_site(config, site.name, site.path) for site in config.data.sites}


def _from_one_file(config: RunConfig) -> dict[str, SiteData]:
    records = read_records(config.data.path, config)
    rng = np.random.default_rng([config.seed, 11])
    count = len(config.site_names)
    # All records of a patient go to one site, by the label of the patient's first record.
    keys = records.patients if records.patients is not None else range(len(records))
    patient_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    owners = np.array([patient_of[key] for key in keys])
    labels = records.labels if records.labels is not None else np.zeros(len(records), dtype=np.int64)
    _, first = np.unique(owners, return_index=True)
    alpha = config.data.alpha if config.data.partition == "dirichlet" else None
    shares = class_shares(int(labels.max()) + 1, count, alpha, rng)
    sites = {}
    for site, patients in zip(config.site_names, deal(labels[first], shares, rng), strict=True):
        mine = np.flatnonzero(np.isin(owners, patients))
        if not len(mine):
            raise UserError(f"site {site} got no records of {config.data.path}; raise data.alpha, or use fewer sites")
        sites[site] = split(records.take(mine), config, site)
    return sites


_SOURCES: dict[str, Callable[[RunConfig], dict[str, SiteData]]] = {
    "icd10": icd10.icd10_sites,
    "files": _from_files,
}
