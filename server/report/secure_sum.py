"""What the report says of a secure sum: what the server could see, and what it could not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import elements as el
from .record import Record


def secure_sum(record: Record) -> str:
    """Terms for the section on what is promised; empty where there was no secure sum."""
    told: Mapping[str, Any] | None = record.run.get("secure_sum")
    if not told:
        return ""
    lead = (
        "<p><b>The secure sum was simulated.</b> One machine made the keys of all sites, so nothing was hidden from "
        "it; the same run of real sites would hide what follows.</p>"
        if record.run.get("execution")
        else ""
    )
    return lead + el.terms(
        [
            ("What the server saw", _SEEN),
            ("Whom one must trust for it", _trust(told)),
            ("What it does not cover", _NOT_COVERED),
            ("How exact it is", _exact(told)),
        ]
    )


_SEEN = (
    "Of the updates of a round their weighted sum and the sum of the weights, over all sites that were left, and "
    "nothing of any single one: each was masked at its site, and the masks cancel in the sum alone."
)
_NOT_COVERED = (
    "What the sum itself says, and the sums of several rounds or runs together, which differential privacy at the "
    "sites bounds; sites that collude with the server beyond the number above, and updates that are lies. Steps, "
    "privacy statements (whose sampling rate tells how many units there are) and evaluation counts are told by site."
)


def _trust(told: Mapping[str, Any]) -> str:
    most = int(told.get("colluders", 0))
    who = f"no more than {most} of the sites collude with it" if most else "no site colludes with it"
    return (
        f"That {who}: then a server that lies in every way learns no more than the sum of the honest sites, since "
        f"{told.get('threshold')} of {told.get('sites')} sites must sign one and the same course of a round before any "
        "of them helps to unmask its sum."
    )


def _exact(told: Mapping[str, Any]) -> str:
    error = told.get("error")
    off = "no round was summed" if error is None else f"no number of any round's mean is off by more than {error:.2g}"
    return (
        f"Integers of {told.get('bits')} bits in which the sum cannot wrap: {off}, where no number changed by more "
        f"than {el.number(told.get('range'), 'g')}."
    )
