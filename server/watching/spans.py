"""A run as spans: one for the run, and in it one for each training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.progress import Passing, Watch
from ...core.watching import tracing
from ..rundir import read_run

_SAID = ("bytes_up", "bytes_down", "accuracy", "loss")


class Traced(Passing):
    """Passes the events of the run in ``folder`` on to ``watch``, and makes spans of them."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        super().__init__(watch)
        self._folder = folder
        self._run = tracing.begin("fedgraft.run")
        self._phase: Any = None

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        if self._run is not None:
            tracing.add(self._run, run=str(read_run(self._folder)["run"]), round=first_round, rounds=rounds)
        super().run_started(first_round=first_round, rounds=rounds, sites=sites)

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        self._phase = tracing.begin(f"fedgraft.{kind}", self._run, kind=kind, round=round, sites=sites)
        super().phase_started(kind, round, sites)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        said = {key: record[key] for key in _SAID if key in record}
        tracing.end(self._phase, answered=len(record["sites"]), missing=len(record["missing"]), **said)
        self._phase = None
        super().phase_finished(record)

    def ended(self, why: str = "") -> None:
        """The run is over; ``why``: what it failed of, if it did."""
        tracing.end(self._phase, why)
        tracing.end(self._run, why)
