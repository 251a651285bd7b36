"""What a run directory tells, read once for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..rundir import each_metric, read_profile, read_run

#: More sites than these are neither listed nor drawn one by one.
MANY = 200


@dataclass(frozen=True)
class Record:
    """What is known of a run: ``run.json``, the lines of ``metrics.jsonl``, and ``profile.json`` where there is one."""

    run: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    profile: Mapping[str, Any] | None = None

    @property
    def many(self) -> bool:
        """Whether there are too many sites to list and draw: then ``lines`` tell how they spread."""
        return len(self.sites) > MANY

    @property
    def sites(self) -> Mapping[str, Mapping[str, Any]]:
        return self.run.get("sites") or {}

    def config(self, section: str) -> Mapping[str, Any]:
        return (self.run.get("config") or {}).get(section) or {}

    def by_round(self, kind: str) -> dict[int, Mapping[str, Any]]:
        """The lines of one kind by round."""
        return {line["round"]: line for line in self.lines if line.get("kind") == kind}

    @cached_property
    def privacy(self) -> Mapping[str, Mapping[str, Any]]:
        """The privacy statement of every site that made one."""
        return {name: site["privacy"] for name, site in self.sites.items() if site.get("privacy")}

    @property
    def private(self) -> bool:
        """Whether differential privacy was asked for; what single sites did is told beside it."""
        return bool(self.config("privacy").get("enabled", False))

    @property
    def seeded(self) -> bool:
        """Whether any noise came from a seed, so that whoever knows the seed can take it off again."""
        return self.private and (
            bool(self.config("privacy").get("seeded_noise_not_private"))
            or any(told.get("enabled") and not told.get("private_noise", True) for told in self.privacy.values())
        )

    @property
    def worst(self) -> Mapping[str, Any] | None:
        """The statement with the largest epsilon: that of the federation."""
        enabled = [told for told in self.privacy.values() if told.get("enabled") and told.get("epsilon") is not None]
        return max(enabled, key=lambda told: told["epsilon"], default=None)

    @property
    def unit(self) -> str:
        return str(self.config("privacy").get("unit", "record"))

    @property
    def evaluation(self) -> str:
        """How results on held-out records left the sites: ``noised``, ``exact_not_private`` or ``none``."""
        release = str(self.config("evaluate").get("release", "auto"))
        if release != "auto":
            return release
        return "noised" if self.private else "exact_not_private"

    @property
    def releases_nothing(self) -> bool:
        return self.evaluation == "none"


def read_record(rundir: Path) -> Record:
    """Read a run directory. Raises ``UserError`` when ``run.json`` is missing, broken or of another schema."""
    run = read_run(rundir)
    many = len(run.get("sites") or {}) > MANY
    lines = [
        _condensed(line) if many else line
        for line in each_metric(rundir)
        if isinstance(line, dict) and isinstance(line.get("round"), int)
    ]
    return Record(run, lines, read_profile(rundir))


def told_epsilon(answer: Mapping[str, Any]) -> float | None:
    """The epsilon in a site's answer to a round, which holds it by itself or in the whole privacy statement."""
    value = answer.get("epsilon", (answer.get("privacy") or {}).get("epsilon"))
    return float(value) if value is not None and math.isfinite(value) else None


def told_accuracy(answer: Mapping[str, Any]) -> float | None:
    """The share of its held-out examples that a site's adapter got right."""
    if answer.get("correct") is None or not answer.get("examples"):
        return None
    return answer["correct"] / answer["examples"]


def spread(values: Iterable[float | None]) -> tuple[float, ...]:
    """Least, lower quartile, median, upper quartile and largest of ``values`` that are there; empty where none is."""
    there = [value for value in values if value is not None]
    return tuple(np.quantile(there, (0, 0.25, 0.5, 0.75, 1)).tolist()) if there else ()


def _condensed(line: Mapping[str, Any]) -> dict[str, Any]:
    """``line`` with how its sites spread in place of what each of them said."""
    sites = line.get("sites") or {}
    return {
        **line,
        "sites": {},
        "answered": len(sites),
        "accuracies": spread(map(told_accuracy, sites.values())),
        "epsilons": spread(map(told_epsilon, sites.values())),
    }


# Values in words. What these return is safe inside HTML.
