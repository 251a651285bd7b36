"""A scenario: the configuration of a simulated federation, by file or by name, and the data of its sites."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..client.data import SiteData
from ..core.config import RunConfig, SimulationConfig, load_config
from ..core.errors import UserError
from ..core.tasks import create_task
from . import baselines
from .federation import Federation
from .partitioners import check_partition
from .shift import check_shifts
from .sources import SOURCES

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
        path = scenario_path(name)
    return complete(load_config(path, overrides))


def scenario_path(name: str) -> Path:
    """The file of a scenario that comes with fedgraft. Raises :class:`UserError` for a name that none has."""
    if name not in named():
        near = difflib.get_close_matches(name, named(), n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(named())}"
        raise UserError(f"{name}: no such file and no scenario of that name; {hint}")
    return _FOLDER / f"{name}.toml"


def complete(config: RunConfig) -> RunConfig:
    """Fill in what the data source knows (the label set, where none is configured) and what a baseline changes.

    Raises :class:`UserError` for a source, a partition or a shift that cannot be.
    """
    if config.data.source not in SOURCES:
        raise UserError(f"data.source `{config.data.source}` is unknown; there are {', '.join(sorted(SOURCES))}")
    check_partition(config.data.partition, config.data.partition_options)
    check_shifts(config)
    own = SOURCES[config.data.source].labels() if not config.task.labels else ()
    if own and create_task(config.task).labelled:
        config = config.model_copy(update={"task": config.task.model_copy(update={"labels": own})})
    return baselines.applied(config)


def site_data(config: RunConfig) -> Mapping[str, SiteData]:
    """Every site's data, by name. Raises :class:`UserError` that names the site or file.

    All of it is made once, so that what is wrong shows at once, and then each site's again when it is asked for.
    """
    # What a site has of its own beside the run (its rank, its steps) leaves these parts the very same objects.
    basis = (config.seed, config.data, config.task, config.privacy, config.simulation)
    for known, sites in _made:
        if all(a is b for a, b in zip(known[1:], basis[1:], strict=True)) and known[0] == basis[0]:
            return sites
    equal = [sites for known, sites in _made if known == basis]
    sites = equal[0] if equal else _make(config)
    _made.append((basis, sites))
    del _made[:-_KEEP]
    return sites


def _make(config: RunConfig) -> Mapping[str, SiteData]:
    if config.simulation.pooled:
        data = config.data.model_copy(update={"sites": config.simulation.pooled})
        apart = config.model_copy(update={"data": data, "simulation": SimulationConfig()})
        return {baselines.POOLED: baselines.pool(site_data(apart).values())}
    sites = Federation(config, SOURCES[config.data.source].dealt(config))
    for site in sites:
        sites[site]
    return sites


_made: list[tuple[tuple[Any, ...], Mapping[str, SiteData]]] = []
_KEEP = 4
