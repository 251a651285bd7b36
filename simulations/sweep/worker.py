"""One run of a sweep, and the process that carries out several of them one after another."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...core.config import RunConfig, config_from_json
from ...core.errors import UserError, one_line
from ...server.rundir import read_run
from ..execution import Execution
from ..run import resume, simulate
from .interrupted import lost_nothing_paid

LOG = "log.txt"


def finished(folder: Path, config: RunConfig) -> bool:
    """Whether ``folder`` holds the finished run of ``config``. Raises :class:`UserError` when it is another's."""
    if not (folder / "run.json").exists():
        return False
    run = read_run(folder)
    if run.get("config_digest") != config.digest():
        raise UserError(f"{folder}: holds another run than the sweep's; move it away")
    return bool(run["status"] == "finished")


def carry_out(config: RunConfig, folder: Path, execution: Execution) -> str:
    """Run ``config`` into ``folder``, from its last checkpoint where it was begun; gives what went wrong, if anything.

    A run that lost a round which its privacy budget had paid for begins anew, so that it can be held against the
    others. What no person can have caused is written to the sweep's log.
    """
    try:
        if finished(folder, config):
            return ""
        if (folder / "run.json").exists() and lost_nothing_paid(folder):
            resume(folder, execution=execution)
        else:
            # Those in the data are simulated, so what was spent on them may be forgotten.
            shutil.rmtree(folder, ignore_errors=True)
            simulate(config, folder, execution=execution)
        return ""
    except UserError as error:
        return one_line(error)
    except Exception as error:
        with (folder.parent.parent / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{folder.name}\n{traceback.format_exc()}\n")
        return f"{one_line(error)}; see {LOG}"


def serve(tasks: Connection, place: str, execution: Mapping[str, Any], processes: int) -> None:
    """Carry out what comes through ``tasks``, (configuration as JSON, folder), until None does; each has an answer.

    The base model and the data of the last runs stay in memory. What the process prints goes to the log in ``place``.
    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    log = os.open(Path(place) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    faulthandler.enable()
    warnings.simplefilter("ignore")
    from ...client.devicememory import share_device

    share_device(processes)
    with contextlib.suppress(EOFError):
        while (task := tasks.recv()) is not None:
            text, folder = task
            tasks.send(carry_out(config_from_json(text, folder), Path(folder), Execution(**execution)))


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
