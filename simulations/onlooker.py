"""What the simulator sees and no server could: virtual time, and whether a backdoor opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..server.onlooker import Onlooker
from ..strategies.flower import Phase
from . import timekeeping
from .backdoor import Probe, target
from .clock import Clock


class Simulator(Onlooker):
    """Adds ``virtual_seconds`` and ``virtual`` where the clock runs, and ``backdoor`` where somebody builds one in.

    ``execution``: what the run is computed on.
    """

    def __init__(self, config: RunConfig, execution: Mapping[str, Any] | None = None) -> None:
        self._execution = execution
        clock = Clock(config)
        self._clock = clock if clock.runs else None
        label = target(config)
        self._label = "" if label is None else config.task.labels[label]
        self._probe = None if label is None else Probe(config, label)

    def of_phase(self, phase: Phase, state: AdapterState) -> dict[str, Any]:
        found: dict[str, Any] = timekeeping.of_phase(phase, self._clock) if self._clock is not None else {}
        if self._probe is not None and phase.kind == "evaluate":
            found["backdoor"] = self._probe.success(state)
        return found

    def of_run(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {"execution": dict(self._execution)} if self._execution is not None else {}
        if self._clock is not None:
            found["virtual"] = timekeeping.of_run(lines)
        if self._probe is not None:
            seen = [line["backdoor"] for line in lines if "backdoor" in line]
            ends = {"success_before": seen[0], "success_after": seen[-1]} if seen else {}
            found["backdoor"] = {"target": self._label, "success_before": None, "success_after": None, **ends}
        return found
