"""Who may add to a run's record what a server cannot know: nobody in a deployment, the simulator in a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.adapter import AdapterState
from ..strategies.flower import Phase


class Onlooker:
    """Adds nothing. A simulation's adds what it alone sees: virtual time, and what an attacker has brought about."""

    def of_phase(self, phase: Phase, state: AdapterState) -> dict[str, Any]:
        """More keys for the line of metrics.jsonl of ``phase``, after which the global adapter is ``state``."""
        return {}

    def of_run(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """More keys for run.json, from the ``lines`` of metrics.jsonl so far, without what they say of single sites."""
        return {}


NOBODY = Onlooker()
