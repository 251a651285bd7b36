"""One simulated run: configuration in, run directory out, on any engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ..client.app import client_app
from ..client.cohort import Cohort
from ..client.data import SiteData
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.profile import current
from ..core.progress import SILENT, Passing, Watch
from ..server.app import run_on
from ..server.rounds import check
from ..server.rundir import RunDirectory, read_metrics, read_run
from .backdoor import target
from .choice import Choice, choose, loads, threads
from .delays import delayed
from .engines.flower import LOG, run_flower
from .engines.inprocess import InProcessGrid
from .engines.pool import Pool
from .engines.workers import WorkersGrid
from .execution import Execution
from .fate import require_enough
from .onlooker import Simulator
from .scenario import complete, site_data
from .sites import SimulatedSites
from .timing import timed

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
    require_runnable(config)
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
    require_runnable(config)
    before = read_run(folder).get("execution")
    return _run(config, folder, execution, before=before, resume=True, watch=watch)


def require_runnable(config: RunConfig) -> None:
    """Refuse what cannot work before anything is loaded. Raises :class:`UserError`."""
    check(config)
    require_enough(config)
    target(config)
    site_data(config)


def _run(
    config: RunConfig,
    output: Path,
    execution: Execution,
    *,
    before: Mapping[str, Any] | None = None,
    resume: bool,
    watch: Watch,
) -> dict[str, Any]:
    data = site_data(config)
    choice = choose(execution, config, data, before)
    if choice.engine == "flower":
        return run_flower(config, output, threads=choice.threads, resume=resume, watch=watch)
    told = choice.told()
    onlooker = Simulator(config, told)
    watch = _Remembering(watch, told, choice.line if execution.engine == "auto" else "")
    with (
        timed(watch, output, choice) if execution.profile else nullcontext(watch) as watch,
        threads(choice.threads),
        _grid(choice, config, data, output.absolute(), watch) as grid,
    ):
        baseline = config.simulation.baseline
        engine = f"baseline:{baseline}" if baseline else choice.engine
        return run_on(
            delayed(grid, config), config, output, engine=engine, resume=resume, watch=watch, onlooker=onlooker
        )


class _Remembering(Passing):
    """Has run.json say where fewer examples passed at a time than the configuration asks for, and what was measured.

    ``chosen``: what the run is computed on and why, for people, once nothing is left that may refuse the run.
    """

    def __init__(self, watch: Watch, told: dict[str, Any], chosen: str) -> None:
        super().__init__(watch)
        self._told = told
        self._chosen = chosen

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        super().run_started(first_round=first_round, rounds=rounds, sites=sites)
        if self._chosen:
            self.note(self._chosen)

    def cohort_found(self, size: int, text: str) -> None:
        self._told |= {"cohort": size, "cohort_why": text}
        super().cohort_found(size, text)

    def smaller_batch(self, site: str, setting: str, size: int, text: str) -> None:
        sizes = self._told.setdefault("smaller", {})
        sizes[setting] = min(size, sizes.get(setting, size))
        super().smaller_batch(site, setting, size, text)


@contextmanager
def _grid(
    choice: Choice, config: RunConfig, data: Mapping[str, SiteData], folder: Path, watch: Watch
) -> Iterator[Grid]:
    if choice.engine == "inprocess":
        cohort = Cohort(choice.cohort)
        sites = SimulatedSites(lambda context: folder, watch, cohort)
        yield InProcessGrid(client_app(sites.answer), len(config.site_names), sites, cohort)
        return
    with Pool(config, choice.workers, choice.threads) as pool:
        yield WorkersGrid(pool, loads(config, data), folder, cohort=choice.cohort, profile=current(), watch=watch)
