"""What the report says of sites that missed rounds, and of what only a simulation knows: virtual time and backdoors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import elements as el
from .record import Record

#: More sites than these are summed up in words alone.
_LISTED = 30
_WORDS = {
    "absent": "not there",
    "late": "no answer in time",
    "crashed": "its process failed",
    "refused": "refused to, or was refused",
}


def counts(record: Record) -> str:
    """How many trainings were missed and why, in all and for each site that missed any."""
    total: Mapping[str, int] = record.run.get("missed") or {}
    if not any(total.values()):
        return ""
    lead = ", ".join(f"{count:,} {fault} ({_WORDS[fault]})" for fault, count in total.items() if count)
    missed = {name: site["missed"] for name, site in record.sites.items() if any((site.get("missed") or {}).values())}
    said = f"<p>Trainings missed, by {el.plural(len(missed), 'site')}: {lead}.</p>"
    if used := sum((record.run.get("late") or {}).values()):
        said += f"<p>{el.plural(used, 'late result')} counted in a later round.</p>"
    if len(missed) > _LISTED:
        return said
    rows = [(el.text(name), *(str(site[fault] or "") for fault in _WORDS)) for name, site in missed.items()]
    return said + el.table(("site", *_WORDS), rows)


def virtual_time(record: Record) -> str:
    """How long the run would have taken by the simulation's clock, and on what."""
    told: Mapping[str, Any] | None = record.run.get("virtual")
    if not told:
        return ""
    waiting = f", {el.duration(told['waiting'])} waiting for late sites" if told.get("waiting") else ""
    return el.terms(
        [
            ("With these links and speeds", f"<b>{el.duration(told['seconds'])}</b>"),
            (
                "Of that",
                f"{el.duration(told['down'])} downloading, {el.duration(told['compute'])} computing, "
                f"{el.duration(told['up'])} uploading{waiting}: of the slowest site of each phase",
            ),
            ("Waited for longest", el.text(told["slowest"])),
        ]
    )


def backdoor(record: Record) -> str:
    """How often triggered records got the attackers' label."""
    told: Mapping[str, Any] | None = record.run.get("backdoor")
    if not told:
        return ""
    before, after = (el.percent(told.get(key)) for key in ("success_before", "success_after"))
    return (
        f"<p>Held-out records of other classes that carry the attackers' trigger were called "
        f"<b>{el.text(told['target'])}</b>: {before} before the run, <b>{after}</b> after it.</p>"
    )
