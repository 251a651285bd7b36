"""A whole sweep: begun or gone on with, on one process or several, with its results at the end."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...client.resident import forget_all
from ...core.errors import UserError
from ...server.files import cannot_write
from ..choice import cores
from ..execution import Execution
from ..run import DEFAULT
from . import page
from .plan import FILE, Planned, Sweep
from .pool import run_in_processes
from .results import Results, row
from .watching import UNWATCHED, Watching
from .worker import carry_out, finished

#: Seconds between two looks at all runs so far, for those who follow the results of a long sweep.
_OFTEN = 20.0


@dataclass(frozen=True)
class Outcome:
    """The results of a sweep, where they lie, and how many runs were carried out now."""

    results: Results
    folder: Path
    carried_out: int


def default_folder(sweep: Sweep) -> Path:
    """``sweeps/NAME-DIGEST`` in the working directory: the same command comes back to the same folder."""
    told = "\n".join(f"{run.name} {run.config.digest()}" for run in sweep.runs)
    return Path("sweeps") / f"{sweep.name or 'sweep'}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def carry_on(
    folder: Path, *, parallel: int = 0, execution: Execution = DEFAULT, watch: Watching = UNWATCHED
) -> Outcome:
    """Go on with the sweep in ``folder``. Raises :class:`UserError` where there is none."""
    return run_sweep(Sweep.read(folder), folder, parallel=parallel, execution=execution, watch=watch)


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    parallel: int = 0,
    execution: Execution = DEFAULT,
    watch: Watching = UNWATCHED,
) -> Outcome:
    """Carry out the runs of ``sweep`` that ``folder`` does not hold finished, and write its results there.

    A run that was begun goes on from its last checkpoint; one that failed is tried again. ``parallel``: processes, each
    of which carries out one run after another; 0: one a GPU, or one a core. Raises :class:`UserError` when ``folder``
    holds another sweep, or another process is at this one.
    """
    with _locked(folder):
        if (folder / FILE).exists():
            sweep.require_same(Sweep.read(folder), folder)
        sweep.write(folder)
        places = {run.name: folder.absolute() / "runs" / run.name for run in sweep.runs}
        todo = [run for run in sweep.runs if not run.refused and not finished(places[run.name], run.config)]
        runnable, gpus = sum(not run.refused for run in sweep.runs), _gpus(sweep.runs)
        processes = _processes(parallel, runnable, execution, gpus)
        if processes > 1 and not execution.threads:
            # Of all runs, however few are left: the number of threads is part of what fixes a result's last bits.
            execution = replace(execution, threads=max(1, cores() // processes))
        processes = min(processes, max(1, len(todo)))
        watch.started(runnable, len(todo), processes)
        failed: dict[str, str] = {}
        written = time.monotonic()

        def ended(index: int, error: str) -> None:
            nonlocal written
            run = todo[index]
            if error:
                failed[run.name] = error
            watch.ended(row(run, places[run.name], failed))
            if time.monotonic() > written + _OFTEN:
                Results.gather(sweep, folder.absolute(), failed).write(folder)
                written = time.monotonic()

        if processes > 1:
            forget_all()  # what the checks loaded, the processes load for themselves
            jobs = [(run.config, places[run.name]) for run in todo]

            def begun(index: int) -> None:
                watch.begun(todo[index].name)

            run_in_processes(jobs, processes, execution, folder.absolute(), begun, ended, gpus)
        else:
            for index, run in enumerate(todo):
                watch.begun(run.name)
                ended(index, carry_out(run.config, places[run.name], execution))
        results = Results.gather(sweep, folder.absolute(), failed)
        results.write(folder)
        page.write(results, folder)
        return Outcome(results, folder, len(todo))


def _gpus(runs: Sequence[Planned]) -> int:
    """GPUs that the runs may be spread over; 0 where one of them computes elsewhere, or on one that it names."""
    spread = all(run.config.train.device in ("auto", "cuda") for run in runs)
    return torch.cuda.device_count() if spread else 0


def _processes(parallel: int, runs: int, execution: Execution, gpus: int) -> int:
    if parallel < 0:
        raise UserError(f"--parallel {parallel} is negative; 0 lets the machine decide")
    # The other engines take several processes for each run.
    most = parallel or ((gpus or cores()) if execution.engine == "inprocess" else 1)
    return max(1, min(most, runs))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{folder}: another process is carrying out this sweep") from None
    try:
        yield
    finally:
        os.close(lock)
