"""Several processes that share the runs of a sweep: one that dies takes no other with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ...core.config import RunConfig
from ..execution import Execution
from .worker import serve

_SPAWN = get_context("spawn")
_PATIENCE = 5.0


@dataclass
class _Worker:
    number: int
    process: SpawnProcess
    tasks: Connection
    at: int | None = None


def run_in_processes(
    runs: Sequence[tuple[RunConfig, Path]],
    processes: int,
    execution: Execution,
    place: Path,
    begun: Callable[[int], None],
    ended: Callable[[int, str], None],
    gpus: int = 0,
) -> None:
    """Carry out ``runs`` in ``processes`` processes, each run in its folder; of several ``gpus`` each process has one.

    ``begun(index)`` and ``ended(index, what went wrong)`` are called here. However this is left, no process stays.
    """
    todo = list(enumerate(runs))[::-1]

    def start(number: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        sharing = -(-processes // max(1, gpus))
        process = _SPAWN.Process(target=serve, args=(theirs, str(place), asdict(execution), sharing))
        with surroundings(execution.threads, number % gpus if gpus > 1 else None), _undisturbed():
            process.start()
        theirs.close()
        return _Worker(number, process, ours)

    def give(worker: _Worker) -> None:
        worker.at = None
        if todo:
            worker.at, (config, folder) = todo.pop()
            begun(worker.at)
            with suppress(BrokenPipeError):  # one that is gone is seen below
                worker.tasks.send((config.to_json(), str(folder)))

    workers: list[_Worker] = []
    try:
        for number in range(min(processes, len(runs))):
            workers.append(start(number))
            give(workers[-1])
        while busy := [worker for worker in workers if worker.at is not None]:
            ready = wait([worker.tasks for worker in busy])
            for worker in (worker for worker in busy if worker.tasks in ready):
                index = worker.at
                try:
                    ended(index, worker.tasks.recv())  # type: ignore[arg-type]
                    give(worker)
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    ended(index, _died(worker.process.exitcode))  # type: ignore[arg-type]
                    workers.remove(worker)
                    if todo:
                        workers.append(start(worker.number))
                        give(workers[-1])
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Have a process that starts now leave Ctrl-C to this one, which ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ": perhaps the memory ran out, for which --parallel may be smaller" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with code {code}"


@contextmanager
def surroundings(threads: int, gpu: int | None) -> Iterator[None]:
    """Have a process that starts now compute with so many threads, and see one GPU: its libraries read this once."""
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
