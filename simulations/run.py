"""One simulated run: configuration in, run directory out, on either engine."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from ..server.app import run_on
from ..server.rounds import check
from ..server.rundir import RunDirectory, read_metrics
from .app import make_simulated_client
from .engines.flower import LOG, run_flower
from .engines.inprocess import InProcessGrid
from .execution import Execution
from .scenario import complete, site_data

DEFAULT = Execution()


def default_output(config: RunConfig) -> Path:
    """``runs/NAME-DATE-TIME`` in the working directory."""
    return Path("runs") / f"{config.name or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"


def simulate(
    config: RunConfig, output: Path | None = None, *, execution: Execution = DEFAULT, watch: Watch = SILENT
) -> dict[str, Any]:
    """Run a simulated federation and return its run.json (docs/run-directory.md).

    Everything that a person may have got wrong is checked first. Raises :class:`UserError` with one line.
    """
    config = complete(config)
    check(config)
    site_data(config)
    output = output or default_output(config)
    existed = output.exists()
    try:
        return _run(config, output, execution, resume=False, watch=watch)
    except UserError:
        # A run that never began leaves nothing worth keeping, unless its line points to a log.
        if not existed and not read_metrics(output) and not (output / LOG).exists():
            shutil.rmtree(output, ignore_errors=True)
        raise


def resume(
    folder: Path, *, rounds: int | None = None, execution: Execution = DEFAULT, watch: Watch = SILENT
) -> dict[str, Any]:
    """Go on with the run in ``folder`` from its last whole checkpoint; ``rounds`` extends it.

    Raises :class:`UserError` when there is no run, no whole checkpoint, or another process is running it.
    """
    with RunDirectory.open(folder) as rundir:
        config = rundir.config()
    if rounds is not None:
        config = config.model_copy(update={"rounds": rounds})
    check(config)
    site_data(config)
    return _run(config, folder, execution, resume=True, watch=watch)


def _run(config: RunConfig, output: Path, execution: Execution, *, resume: bool, watch: Watch) -> dict[str, Any]:
    if execution.engine == "flower":
        return run_flower(config, output, resume=resume, watch=watch)
    client = make_simulated_client(output.absolute(), watch)
    grid = InProcessGrid(client, len(config.site_names))
    return run_on(grid, config, output, engine=execution.engine, resume=resume, watch=watch)
