"""Where a run is, from its files alone: what page, metrics and logs are views of.

Nothing is asked of the run: its folder may be another process's, half written, or not there yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...core.watching.follow import Follower
from ...core.watching.screen import moment, plain
from ..tally import Tally
from .progress import Phase, read_progress

#: So many of the last phases of a kind say how long the next will take.
_PACE = 10


@dataclass(frozen=True)
class SiteView:
    """A site as the server knows it: only what the site sent, or that it sent nothing.

    ``answered`` of ``asked`` trainings; ``missed``: the others by fault; ``why``: of the last phase, if it gave nothing
    to that; ``heard``: when a phase ended that it answered; ``connected``: None where there is nobody to ask.
    """

    name: str
    answered: int = 0
    asked: int = 0
    missed: Mapping[str, int] = field(default_factory=dict)
    why: str = ""
    heard: datetime | None = None
    steps: int = 0
    epsilon: float | None = None
    accuracy: float | None = None
    connected: bool | None = None


@dataclass(frozen=True)
class RunView:
    """A run: ``status`` is absent, starting, running, stopped (its process is gone), finished or failed.

    ``epsilon``: what the job lets each site spend, None without privacy. ``seconds``: of each phase so far, by kind.
    ``left``: seconds to the end by the pace so far, None while nothing was timed.
    """

    folder: Path
    name: str
    run: str = ""
    status: str = "absent"
    error: str = ""
    round: int = 0
    rounds: int = 0
    phase: Phase | None = None
    strategy: str = ""
    engine: str = ""
    started: datetime | None = None
    spent: float = 0.0
    left: float | None = None
    epsilon: float | None = None
    accuracy: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()
    sites: tuple[SiteView, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def phase_seconds(self, now: datetime | None = None) -> float:
        """Since the phase at hand began."""
        return ((now or datetime.now(UTC)) - self.phase.began).total_seconds() if self.phase is not None else 0.0


class RunReader:
    """Looks at the run in ``folder`` again and again; each look reads only what was added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = Follower(folder / "metrics.jsonl")
        self._begun = 0
        self._forget()

    def _forget(self) -> None:
        self._tally = Tally()
        self._heard: dict[str, datetime] = {}
        self._steps: dict[str, int] = {}
        self._why: dict[str, str] = {}

    def look(self) -> RunView:
        """The run as it is now."""
        new = self._lines.new()
        if self._lines.begun != self._begun:
            self._begun = self._lines.begun
            self._forget()
        for line in new:
            self._add(line)
        run, progress = _read(self.folder / "run.json"), read_progress(self.folder)
        view = RunView(self.folder, self.folder.name, phase=progress.phase if progress is not None else None)
        gone = progress is not None and not progress.alive
        if not run:
            return replace(view, status="absent" if progress is None else "stopped" if gone else "starting")
        status = str(run.get("status", ""))
        if status == "running" and (progress is None or gone):
            status = "stopped"
        if status != "running":
            view = replace(view, phase=None)
        return self._filled(replace(view, status=status), run)

    def _add(self, line: Mapping[str, Any]) -> None:
        try:
            self._tally.add(line)
        except (KeyError, TypeError, AttributeError):
            return  # a line of another version
        at = moment(line.get("time"))
        for name, told in line["sites"].items():
            if at is not None:
                self._heard[name] = at
            if line["kind"] == "train":
                self._steps[name] = self._steps.get(name, 0) + int(told.get("steps", 0))
            self._why.pop(name, None)
        for name, why in line["missing"].items():
            self._why[name] = plain(why, 1000).removeprefix(f"{name}: ")

    def _filled(self, view: RunView, run: Mapping[str, Any]) -> RunView:
        config = run.get("config", {})
        told = run.get("sites", {})
        privacy = config.get("privacy", {})
        phases = {kind: self._tally.of_kind(kind) for kind in ("train", "evaluate")}
        sites = tuple(self._site(name, told[name]) for name in sorted(told))
        done = max([int(run.get("rounds", 0)), *(int(line["round"]) for line in phases["train"])])
        rounds = int(config.get("rounds", 0))
        started = moment(run.get("started"))
        spent = float(run.get("seconds", 0))
        if view.status == "running" and started is not None and not run.get("resumed"):
            spent = (datetime.now(UTC) - started).total_seconds()
        seconds = {kind: tuple(float(line["seconds"]) for line in lines) for kind, lines in phases.items()}
        view = replace(
            view,
            name=plain(run.get("name") or view.name),
            run=str(run.get("run", "")),
            error=plain(run.get("error", ""), 1000),
            round=view.phase.round if view.phase is not None else done,
            rounds=rounds,
            strategy=str(run.get("strategy", {}).get("name", "")),
            engine=str(run.get("engine", "")),
            started=started,
            spent=spent,
            epsilon=float(privacy["epsilon"]) if privacy.get("enabled") else None,
            accuracy=_values(phases["evaluate"], "accuracy"),
            loss=_values(phases["evaluate"], "loss"),
            sites=sites,
            bytes_up=sum(int(line["bytes_up"]) for line in self._tally.lines),
            bytes_down=sum(int(line["bytes_down"]) for line in self._tally.lines),
            seconds=seconds,
        )
        every = int(config.get("evaluate", {}).get("every", 1) or 0)
        return replace(view, left=_left(view, every)) if view.status == "running" else view

    def _site(self, name: str, told: Mapping[str, Any]) -> SiteView:
        found = self._tally.site(name, {})
        # A run that goes on after a rest knows more than its lines: what was spent in rounds that were lost.
        epsilon = found["epsilon"] if found["epsilon"] is not None else told.get("epsilon")
        return SiteView(
            name,
            answered=found["rounds"],
            asked=self._tally.asked(name),
            missed={fault: count for fault, count in found["missed"].items() if count},
            why=self._why.get(name, ""),
            heard=self._heard.get(name),
            steps=self._steps.get(name, 0),
            epsilon=epsilon,
            accuracy=found["accuracy"],
        )


def _left(view: RunView, every: int) -> float | None:
    """Seconds to the end: the phases to come at the pace of the last ones, less what the one at hand has taken."""
    pace = {kind: sum(last) / len(last) for kind, took in view.seconds.items() if (last := took[-_PACE:])}
    if "train" not in pace:
        return None
    done = len(view.seconds["train"])
    trainings = max(0, view.rounds - done)
    phase = view.phase
    evaluated_next = phase is not None and phase.kind == "evaluate"
    rounds = range(phase.round if evaluated_next and phase is not None else done + 1, view.rounds + 1)
    evaluations = sum(1 for number in rounds if number == view.rounds or (every and number % every == 0))
    total = trainings * pace["train"] + evaluations * pace.get("evaluate", 0.0)
    at_hand = min(view.phase_seconds(), pace.get(phase.kind, 0.0)) if phase is not None else 0.0
    return max(0.0, total - at_hand)


def _values(lines: list[dict[str, Any]], key: str) -> tuple[float, ...]:
    return tuple(float(line[key]) for line in lines if line.get(key) is not None)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
