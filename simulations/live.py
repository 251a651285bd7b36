"""A run as it goes, in a terminal: a bar for the whole, below it the sites, above it a line for what is over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..core.config import RunConfig
from ..core.progress import Watch
from ..core.watching.screen import clock, size
from .display import phase_line

#: Times a second that the terminal is drawn anew: an event of the run only notes what is to be shown.
_REFRESH = 4
#: More sites than these have one line together.
_EACH = 8
#: Of so many that are at work at a time, a line each is shown then.
_ACTIVE = 4
#: An evaluation counts as this many training steps of a site, until both have been timed.
_EVALUATION_STEPS = 1
#: Seconds between two lines about a phase that goes on, where there is no terminal.
_SIGN_OF_LIFE = 30.0


@dataclass
class _Site:
    """Where a site is in the phase at hand."""

    step: int = 0
    steps: int = 0
    loss: float | None = None
    epsilon: float | None = None

    @property
    def words(self) -> str:
        parts = [f"step {self.step}/{self.steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.epsilon is not None:
            parts.append(f"ε {self.epsilon:.2f}")
        return "  ".join(parts)


class _Plan:
    """How much of the run is done, and how long the rest will take by what its phases took so far."""

    def __init__(self) -> None:
        self.total = self.done = 0.0
        self.kind = ""
        self._left: dict[str, float] = {}
        self._took: dict[str, tuple[float, float]] = {}
        self._weight, self._began = 0.0, time.monotonic()

    def begin_run(self, left: Mapping[str, float]) -> None:
        """``left``: the work of each kind that is to come."""
        self._left = dict(left)
        self.total, self.done = sum(left.values()), 0.0

    def begin(self, kind: str, weight: float) -> None:
        self.kind, self._weight, self._began = kind, weight, time.monotonic()

    def end(self) -> None:
        """The phase is over, whoever answered in it."""
        weight, seconds = self._took.get(self.kind, (0.0, 0.0))
        self._took[self.kind] = (weight + self._weight, seconds + time.monotonic() - self._began)
        self._left[self.kind] = max(0.0, self._left.get(self.kind, 0.0) - self._weight)
        self.done = self.total - sum(self._left.values())
        self._weight = 0.0

    def part(self, fraction: float) -> float:
        """The share of the run that is done, when ``fraction`` of the phase at hand is."""
        return (self.done + self._weight * min(1.0, fraction)) / self.total if self.total else 0.0

    def seconds_left(self, fraction: float) -> float | None:
        """None while nothing has been timed."""
        pace = {kind: seconds / weight for kind, (weight, seconds) in self._took.items() if weight}
        spent = time.monotonic() - self._began
        if self._weight and fraction > 0.02 and self.kind not in pace:
            pace[self.kind] = spent / (self._weight * min(1.0, fraction))
        if not pace:
            return None
        rough = sum(pace.values()) / len(pace)
        seconds = sum(left * pace.get(kind, rough) for kind, left in self._left.items())
        return max(0.0, seconds - (min(spent, pace.get(self.kind, rough) * self._weight) if self._weight else 0.0))


class Live(Watch):
    """Shows a run; plain lines where ``console`` is no terminal."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.config = config
        self._plan = _Plan()
        self._where = "loading the base model and the sites' data"
        self._began = self._told = time.monotonic()
        self._bytes = 0
        self._names: list[str] = []
        # Of the phase at hand: how many sites it has, who is at work, what each has come to, how many steps were taken.
        self._asked = self._steps = self._finished = 0
        self._active: dict[str, _Site] = {}
        self._over: dict[str, _Site] = {}
        self._missing: Mapping[str, str] = {}
        self._screen = Screen(console=console, get_renderable=self._frame, refresh_per_second=_REFRESH, transient=True)

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.stop()

    # What happens

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self._names = sorted(sites)
        every = self.config.evaluate.every
        left = range(first_round, rounds + 1)
        evaluations = sum(1 for r in left if r == rounds or (every and r % every == 0)) + (first_round == 1)
        trainings = len(left) * (self.config.server.sites_per_round or len(sites))
        self._plan.begin_run(
            {
                "train": trainings * self.config.train.local_steps,
                "evaluate": evaluations * len(sites) * _EVALUATION_STEPS,
            }
        )

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        self._where = f"round {round}/{self.config.rounds} {'training' if kind == 'train' else 'evaluating'}"
        self._asked, self._steps, self._finished = sites, 0, 0
        self._active, self._over = {}, {}
        if kind == "train":
            self._missing = {}
        self._plan.begin(kind, sites * (self.config.train.local_steps if kind == "train" else _EVALUATION_STEPS))

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        now = self._active.get(site)
        if now is None:
            now = self._active[site] = _Site()
        now.step, now.steps, now.loss, now.epsilon = step, steps, loss, epsilon
        self._steps += 1

    def site_finished(self, kind: str, site: str) -> None:
        self._finished += 1
        self._over[site] = self._active.pop(site, _Site())
        if not self.console.is_terminal and time.monotonic() - self._told > _SIGN_OF_LIFE:
            self._told = time.monotonic()
            self.console.print(Text(f"{self._where}: {self._finished:,} of {self._asked:,} sites"), soft_wrap=True)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self._told = time.monotonic()
        self._bytes += record["bytes_up"] + record["bytes_down"]
        self._missing = {**record["missing"], **record.get("faults", {})}
        self._plan.end()
        self.console.print(Text(phase_line(record, self.config.rounds)), soft_wrap=True, highlight=False)

    # What is shown

    @property
    def done(self) -> float:
        """The share of the run that is done."""
        return self._plan.part(self._fraction)

    @property
    def _fraction(self) -> float:
        """How much of the phase at hand is done."""
        if not self._asked:
            return 0.0
        if self._plan.kind == "evaluate":
            return self._finished / self._asked
        return self._steps / (self._asked * self.config.train.local_steps)

    def _frame(self) -> RenderableType:
        rows: list[RenderableType] = [self._whole()]
        if self._names and len(self._names) <= _EACH:
            rows.append(self._each())
        elif self._names:
            rows += self._together()
        return Group(*rows)

    def _whole(self) -> Table:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_column(ratio=1)
        for _ in range(2):
            row.add_column(no_wrap=True)
        left = self._plan.seconds_left(self._fraction)
        started = bool(self._plan.total)
        times = f"{clock(time.monotonic() - self._began)}, {'–' if left is None else clock(left)} left"
        row.add_row(
            Text(f"{self._where} · {size(self._bytes)}" if started else self._where),
            ProgressBar(total=1.0, completed=self.done, pulse=not started),
            Text(f"{100 * self.done:3.0f} %" if started else ""),
            Text(times if started else clock(time.monotonic() - self._began)),
        )
        return row

    def _each(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        table.add_column(width=16)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name in self._names:
            site = self._active.get(name) or self._over.get(name)
            part = site.step / site.steps if site is not None and site.steps else float(name in self._over)
            table.add_row(
                Text(f"  {name}"), ProgressBar(total=1.0, completed=part), self._words(name, site, name in self._over)
            )
        return table

    def _words(self, name: str, site: _Site | None, over: bool) -> Text:
        words = site.words if site is not None and site.steps else "done" if over else ""
        missing = self._missing.get(name)
        return Text.assemble(words, "  " if words and missing else "", (missing or "", "yellow"))

    def _together(self) -> list[RenderableType]:
        missing = f", {len(self._missing):,} missing" if self._missing else ""
        active = list(self._active.items())
        lines = [f"  {self._finished:,} of {self._asked:,} sites{missing}"]
        lines += [f"  {name}  {site.words}" for name, site in active[:_ACTIVE]]
        if len(active) > _ACTIVE:
            lines.append(f"  and {len(active) - _ACTIVE:,} more at work")
        return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
