"""progress.json: what a run is at, for whoever looks from another process. It is there while the run is."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ...core.progress import Passing, Watch
from ...core.watching.screen import moment
from ..rundir import now

FILE = "progress.json"
#: Seconds within which two readings of when a process was made are of the same one.
_SAME = 1.0


class Noted(Passing):
    """Passes the events of the run in ``folder`` on to ``watch``, and notes which phase it is at.

    A disk that is full stops no run here, and nothing is flushed: after a power cut nobody is at work anyway.
    """

    def __init__(self, watch: Watch, folder: Path) -> None:
        super().__init__(watch)
        self._path = folder / FILE
        own = psutil.Process()
        self._values: dict[str, Any] = {
            "schema": 1,
            "host": socket.gethostname(),
            "process": own.pid,
            "created": own.create_time(),
            "phase": None,
        }
        self._write()

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        self._values["phase"] = {"kind": kind, "round": round, "sites": sites, "began": now()}
        self._write()
        super().phase_started(kind, round, sites)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self._values["phase"] = None
        self._write()
        super().phase_finished(record)

    def close(self) -> None:
        """The run is over, well or badly, and its other files say so."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        beside = self._path.with_name(f".{FILE}.new")
        with suppress(OSError):
            beside.write_text(json.dumps(self._values), encoding="utf-8")
            beside.replace(self._path)


@dataclass(frozen=True)
class Phase:
    """A training or an evaluation that goes on."""

    kind: str
    round: int
    sites: int
    began: datetime


@dataclass(frozen=True)
class Progress:
    """What progress.json says: whether the process is ``alive`` (True too where it is another machine's)."""

    alive: bool
    phase: Phase | None


def read_progress(folder: Path) -> Progress | None:
    """None where nothing is noted: the run is over, or was never begun."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        told = values["phase"]
        phase = None
        if told is not None and (began := moment(told["began"])) is not None:
            phase = Phase(str(told["kind"]), int(told["round"]), int(told["sites"]), began)
        alive = values["host"] != socket.gethostname() or _alive(int(values["process"]), float(values["created"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Progress(alive, phase)


def _alive(pid: int, created: float) -> bool:
    if pid == os.getpid():
        return True
    try:
        return abs(psutil.Process(pid).create_time() - created) < _SAME
    except psutil.Error:
        return False
