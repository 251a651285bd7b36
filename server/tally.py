"""What a run comes to so far, by the lines of metrics.jsonl: to read them all after each round would not scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.wire import FAULTS

#: What a line says of single sites, which only their own sums keep.
_BY_SITE = ("sites", "missing", "faults", "resting", "late")


@dataclass(slots=True)
class _Site:
    """A site's part in the run: rounds answered and rested, what it missed, what it scored and promised.

    ``late``: its results that counted in a later round, by how many rounds later.
    """

    answered: int = 0
    rested: int = 0
    records: int = 0
    scored: bool = False
    before: float | None = None
    after: float | None = None
    privacy: Mapping[str, Any] | None = None
    missed: dict[str, int] | None = None
    late: dict[int, int] | None = None
    silent: bool = False


class Tally:
    """The sums over the lines of a run. ``lines``: each of them without what it says of single sites."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.lines: list[dict[str, Any]] = []
        #: Updates that sites sent in all rounds together.
        self.updates = 0
        self._trainings = 0
        self._sites: dict[str, _Site] = {}
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the next line."""
        self.lines.append({key: value for key, value in line.items() if key not in _BY_SITE})
        training = line["kind"] == "train"
        for name, told in line["sites"].items():
            site = self._of(name)
            site.silent = False
            if training:
                site.answered += 1
                site.records = int(told.get("records", 0))
            elif line["kind"] == "evaluate":
                site.after = told["correct"] / told["examples"] if told.get("examples") else None
                if not site.scored:
                    site.before, site.scored = site.after, True
            if "privacy" in told:
                self.promised(name, told["privacy"])
        if not training:
            return
        self._trainings += 1
        self.updates += len(line["sites"])
        for name in line.get("resting", ()):
            self._of(name).rested += 1
        for late in line.get("late", ()):
            self._taken_late(late)
        for name, fault in line.get("faults", {}).items():
            site = self._of(name)
            site.missed = {**(site.missed or {}), fault: (site.missed or {}).get(fault, 0) + 1}
            site.silent = site.silent or fault != "absent"

    def _taken_late(self, entry: Mapping[str, Any]) -> None:
        if entry["why"]:
            return
        site, age = self._of(entry["site"]), int(entry["age"])
        self.updates += 1
        site.late = {**(site.late or {}), age: (site.late or {}).get(age, 0) + 1}
        if "privacy" in entry:
            self.promised(entry["site"], entry["privacy"])

    def promised(self, name: str, statement: Mapping[str, Any]) -> None:
        """Take in a privacy statement: the one that counts the most steps stands, of equals the last."""
        site = self._of(name)
        if site.privacy is None or _cost(statement) >= _cost(site.privacy):
            site.privacy = statement

    def asked(self, name: str) -> int:
        """Rounds in which the site was to train."""
        return self._trainings - self._of(name).rested

    def silent(self) -> list[str]:
        """The sites that may have spent privacy after they last said how much."""
        return sorted(name for name, site in self._sites.items() if site.silent)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def site(self, name: str, facts: Mapping[str, float]) -> dict[str, Any]:
        """The entry of a site in run.json; ``facts``: what it said on joining."""
        site = self._of(name)
        privacy = site.privacy or {}
        missed = site.missed or {}
        return {
            "records": int(facts.get("records", site.records)),
            "units": int(facts.get("units", 0)),
            "held_out": int(facts.get("held_out", 0)),
            "accuracy_before": site.before,
            "accuracy": site.after,
            **{key: privacy.get(key) for key in ("epsilon", "delta", "unit")},
            "rounds": site.answered,
            "missed": {fault: missed.get(fault, 0) for fault in FAULTS},
            "late": {str(age): count for age, count in sorted((site.late or {}).items())},
            "privacy": site.privacy,
        }

    def _of(self, name: str) -> _Site:
        if name not in self._sites:
            self._sites[name] = _Site()
        return self._sites[name]


def _cost(statement: Mapping[str, Any]) -> tuple[float, float]:
    return statement["steps"], statement["epsilon"]
