"""Jobs that are not over: written down before they start, and started again when what ran them has died.

Flower ends a run whose ServerApp has died, and a SuperLink that was killed starts none again. `fedgraft server start`
looks for such jobs, and has them go on from their last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...core.config import RunConfig, config_from_json
from ...core.errors import UserError
from ...deployment.files import PRIVATE_FILE, private_folder, write
from ...deployment.kits import ServerKit
from ...privacy.auditlog import AuditLog
from ..rundir import RunDirectory, read_run
from .control import Control, Run

#: The states of Flower's runs in which nothing runs any more.
OVER = ("completed", "failed", "stopped")
#: How often a job is started again without having come a round further.
TRIES = 3
_FINAL = ("finished", "failed", "stopped")
#: How Flower says that a ServerApp raised; of one that was killed it says that its heartbeat is missing.
_BY_ITSELF = "ServerApp failed with exception"


@dataclass(frozen=True)
class Pending:
    """A job that was submitted and is not known to be over.

    ``config``: its configuration as JSON; ``stopped``: whether somebody ended it; ``tries``: how often it was started
    again since it had reached ``round``.
    """

    name: str
    config: str
    stopped: bool = False
    tries: int = 0
    round: int = -1

    @classmethod
    def of(cls, kit: ServerKit, name: str) -> Pending | None:
        """The job of this name; None where it is over. Raises :class:`UserError` for a file that cannot be read."""
        path = _path(kit, name)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path}: cannot be read; move it away, and resume the job by hand") from None

    def keep(self, kit: ServerKit) -> None:
        """Write it down. Raises :class:`UserError` when the disk is full or read-only."""
        private_folder(_path(kit, self.name).parent)
        write(_path(kit, self.name), json.dumps(asdict(self)), PRIVATE_FILE)

    def forget(self, kit: ServerKit) -> None:
        _path(kit, self.name).unlink(missing_ok=True)


def _path(kit: ServerKit, name: str) -> Path:
    return kit.state / "jobs" / f"{name}.json"


def revive(kit: ServerKit, control: Control, *, alone: bool) -> Iterator[str]:
    """Start the jobs again that nothing runs any more; forget those that are over. Gives a line for each.

    ``alone``: whether the SuperLink has just been started, so that what it takes for running is not. Raises
    :class:`UserError`.
    """
    names = sorted(path.stem for path in (kit.state / "jobs").glob("[!.]*.json"))
    runs = {run.name: run for run in control.runs()} if names else {}
    for name in names:
        job, run = Pending.of(kit, name), runs.get(name)
        if job is None:
            continue
        if run is not None and run.status not in OVER:
            if not alone:
                continue
            control.stop(run.id)
        try:
            line = _settled(kit, control, job, run)
        except _StillRunningError:
            continue
        if line:
            yield line


class _StillRunningError(Exception):
    """A process of the job is about to end."""


def _settled(kit: ServerKit, control: Control, job: Pending, run: Run | None) -> str:
    from .jobs import start

    folder = kit.runs / job.name
    if not (folder / "run.json").exists():
        # It died, or was stopped, before it had reached anything.
        status, reached = "", -1
    else:
        told = read_run(folder)
        status, reached = told["status"], int(told.get("rounds", 0))
    own = run is not None and run.status == "failed" and run.details.startswith(_BY_ITSELF)
    if status in _FINAL or job.stopped or own:
        if status not in _FINAL:
            _close(folder, status, "stopped" if job.stopped else "failed", run.details if own and run else "")
        job.forget(kit)
        return ""
    tries = job.tries + 1 if reached == job.round else 1
    where = f"from round {reached + 1}" if reached >= 0 else "from the start"
    if tries > TRIES:
        error = f"its process ended {tries} times without coming further; fedgraft job logs {job.name} says more"
        _close(folder, status, "failed", error)
        job.forget(kit)
        return f"{job.name}: {error}; then: fedgraft job submit CONFIG --resume {job.name}"
    _free(folder, status)
    config: RunConfig = config_from_json(job.config, str(_path(kit, job.name)))
    replace(job, tries=tries, round=reached).keep(kit)
    AuditLog(kit.state).write("resumed", run=job.name, job=config.digest(), tries=tries)
    start(control, config, job.name, resume=bool(status))
    return f"{job.name}: what ran it has died; it goes on {where}"


def _free(folder: Path, status: str) -> None:
    """Raise :class:`_StillRunningError` while a process holds the run directory."""
    if status:
        _locked(folder).close()


def _close(folder: Path, status: str, end: str, error: str) -> None:
    """Write down how a job ended whose process can do so no more."""
    if not status:
        return
    with _locked(folder) as rundir:
        values: dict[str, Any] = rundir.read_run()
        rundir.write_run({**values, "status": end, "error": error})


def _locked(folder: Path) -> RunDirectory:
    try:
        return RunDirectory.open(folder)
    except UserError:
        raise _StillRunningError from None
