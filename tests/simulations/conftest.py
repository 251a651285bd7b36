"""Workers that tests share: their start takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import RunConfig
from fedgraft.core.progress import SILENT, Watch
from fedgraft.server.app import run_on
from fedgraft.simulations.engines.pool import Pool
from fedgraft.simulations.engines.workers import WorkersGrid
from fedgraft.simulations.onlooker import Simulator


@pytest.fixture(scope="session")
def pool(tiny_federation: Any) -> Iterator[Pool]:
    """Two workers with one thread each."""
    with Pool(tiny_federation.config(), 2, 1) as pool:
        yield pool


@pytest.fixture(scope="session")
def on_workers(pool: Pool) -> Callable[..., dict[str, Any]]:
    """``on_workers(config, output, resume=False, watch=SILENT, **grid)``: a run on the shared workers."""

    def run(config: RunConfig, output: Path, resume: bool = False, watch: Watch = SILENT, **grid: Any) -> Any:
        nodes = WorkersGrid(grid.pop("pool", pool), [1.0] * len(config.site_names), output, watch=watch, **grid)
        simulator = Simulator(config, {})
        return run_on(nodes, config, output, engine="workers", resume=resume, watch=watch, onlooker=simulator)

    return run
