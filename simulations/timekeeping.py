"""What a run would have taken: the virtual seconds of a phase, and of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..strategies.flower import Phase
from .clock import Clock, Times

_PARTS = ("down", "compute", "up", "waiting")


def of_phase(phase: Phase, clock: Clock) -> dict[str, Any]:
    """``virtual_seconds`` of a phase, and in ``virtual`` what they were spent on, and the site waited for longest.

    The exchanges of a phase follow each other, and each ends with its slowest site; where somebody is late, at the
    deadline, all of which counts as ``waiting``. Nobody waits for a site that is known to be absent.
    """
    parts = dict.fromkeys(_PARTS, 0.0)
    waits: list[tuple[float, str]] = []
    for number, exchange in enumerate(phase.exchanges):
        after = phase.exchanges[number + 1 :]
        asked_again = {site for later in after for site in later.down}
        begun_later = {site for later in after if later.kind == exchange.kind for site in later.down}
        faults = {site: phase.faults.get(site, "") for site in exchange.down if site not in asked_again}
        late = [site for site, fault in faults.items() if fault == "late"]
        if late:
            parts["waiting"] += clock.deadline
            waits.append((-clock.deadline, min(late)))
            continue
        times = {}
        for site, size in exchange.down.items():
            work = clock.compute(site, exchange.kind) if site not in begun_later else Times()
            if faults.get(site) == "absent":
                times[site] = Times()
            elif faults.get(site) == "crashed":
                times[site] = clock.down(site, size) + Times(compute=work.compute / 2)
            else:
                times[site] = clock.down(site, size) + work + clock.up(site, exchange.up.get(site, 0))
        if times:
            # Of equals the first by name, whatever the order of the answers.
            wait, slowest = min((-taken.total, site) for site, taken in times.items())
            waits.append((wait, slowest))
            for part in ("down", "compute", "up"):
                parts[part] += getattr(times[slowest], part)
    slowest = min(waits)[1] if waits else ""
    return {"virtual_seconds": sum(parts.values()), "virtual": {"slowest": slowest, **parts}}


def of_run(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ``virtual`` section of run.json: seconds, on what, and the site that the others waited for longest."""
    timed: Sequence[Mapping[str, Any]] = [line for line in lines if "virtual" in line]
    if not timed:
        return None
    waited: dict[str, float] = {}
    for line in timed:
        name = line["virtual"]["slowest"]
        waited[name] = waited.get(name, 0.0) + line["virtual_seconds"]
    parts = {part: sum(line["virtual"][part] for line in timed) for part in _PARTS}
    slowest = min(waited, key=lambda name: (-waited[name], name))
    return {"seconds": sum(parts.values()), "slowest": slowest, **parts}
