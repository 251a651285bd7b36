"""The audit of the audit: every known fault, put into the real path, must be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ...core.errors import UserError
from .faults import FAULTS, Fault
from .layers import Audit
from .subject import Subject


@dataclass(frozen=True)
class Caught:
    """What became of one fault: ``by`` the layer that caught it, or empty; ``finding``: the first thing it said."""

    fault: str
    text: str
    by: str
    finding: str

    @property
    def good(self) -> bool:
        return bool(self.by)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def applicable(subject: Subject) -> list[Fault]:
    """The faults that the plan of ``subject`` could have."""
    return [fault for fault in FAULTS if fault.applies(subject)]


def self_test(
    subject: Subject, *, steps: int = 6, canaries: int = 256, watch: Callable[[str], None] = lambda fault: None
) -> list[Caught]:
    """Let the layer that is meant to catch each fault look at it; ``watch`` is told before each."""
    found = []
    for fault in applicable(subject):
        watch(fault.name)
        found.append(_one(Audit(subject, steps=steps, canaries=canaries, fault=fault)))
    return found


def _one(audit: Audit) -> Caught:
    fault = audit.fault
    try:
        (verdict,) = audit.run([fault.caught_by])
    except UserError as error:
        # What the trainer or the engine refuses by itself never trains.
        return Caught(fault.name, fault.text, "refused", str(error))
    if verdict.good:
        return Caught(fault.name, fault.text, "", "")
    return Caught(fault.name, fault.text, fault.caught_by, verdict.findings[0])
