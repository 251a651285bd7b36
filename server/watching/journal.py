"""What a run tells the log: each phase with its numbers, who was missing, and how it ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.progress import Passing, Watch
from ...core.watching.logs import event
from ..rundir import read_run

_SAID = ("seconds", "bytes_up", "bytes_down", "accuracy", "loss", "faults")


class Logged(Passing):
    """Passes the events of the run in ``folder`` on to ``watch``, and logs them."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        super().__init__(watch)
        self._folder = folder
        self._run = ""

    def note(self, text: str) -> None:
        self._log("note", level=logging.WARNING, text=text)
        super().note(text)

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self._log("run_started", round=first_round, rounds=rounds, sites=sorted(sites))
        super().run_started(first_round=first_round, rounds=rounds, sites=sites)

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        self._log("phase_started", kind=kind, round=round, sites=sites)
        super().phase_started(kind, round, sites)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        said = {key: record[key] for key in _SAID if key in record}
        self._log("phase_finished", kind=record["kind"], round=record["round"], answered=len(record["sites"]), **said)
        super().phase_finished(record)

    def ended(self, why: str = "") -> None:
        """The run is over; ``why``: what it failed of, if it did."""
        if why:
            self._log("run_failed", level=logging.ERROR, why=why)
        else:
            self._log("run_finished")

    def _log(self, name: str, *, level: int = logging.INFO, **values: Any) -> None:
        if not self._run:
            with suppress(UserError):  # it has no number before it begins
                self._run = str(read_run(self._folder)["run"])
        event("run", name, level=level, run=self._run, **values)
