"""What a person sees of a run in the terminal: live progress, and one table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..core.config import RunConfig
from ..core.progress import Watch

#: An evaluation counts as this many training steps of a site in the time left.
_EVALUATION_STEPS = 1


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


class Live(Watch):
    """A bar over the whole run with round, site, step, loss, epsilon and bytes; plain lines without a terminal."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.config = config
        self._bytes = 0
        self._where = ""
        self._began = time.monotonic()
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Live:
        self._progress.start()
        self._task = self._progress.add_task("loading the base model and the sites' data", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        every = self.config.evaluate.every
        left = range(first_round, rounds + 1)
        evaluations = sum(1 for r in left if r == rounds or (every and r % every == 0)) + (first_round == 1)
        steps = len(left) * self.config.train.local_steps + evaluations * _EVALUATION_STEPS
        if self._task is not None:
            self._progress.update(self._task, total=steps * len(sites), completed=0)

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        verb = "training" if kind == "train" else "evaluating"
        self._describe(f"round {round}/{self.config.rounds} {verb}")
        self._where = f"round {round}/{self.config.rounds}"

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        parts = [self._where, site, f"step {step}/{steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if epsilon is not None:
            parts.append(f"ε {epsilon:.2f}")
        parts.append(size(self._bytes))
        self._describe(" · ".join(parts))
        self._advance(1)

    def site_finished(self, kind: str, site: str) -> None:
        if kind == "evaluate":
            self._advance(_EVALUATION_STEPS)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self._bytes += record["bytes_up"] + record["bytes_down"]
        self.console.print(Text(phase_line(record, self.config.rounds)), soft_wrap=True, highlight=False)

    def _describe(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=text)

    def _advance(self, steps: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, steps)


class Lines(Watch):
    """Plain lines, for a log."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.config = config

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self.console.print(Text(phase_line(record, self.config.rounds)), soft_wrap=True)


def phase_line(record: Mapping[str, Any], rounds: int) -> str:
    """One line for a training or evaluation that is over."""
    parts = [f"round {record['round']}/{rounds}", f"{record['kind']:<8}"]
    if record["kind"] == "evaluate":
        parts.append(f"accuracy {percent(record['accuracy'])}")
        if record["loss"] is not None:
            parts.append(f"loss {record['loss']:.3f}")
    else:
        parts.append(f"{len(record['sites'])} sites")
        losses = [site["loss"] for site in record["sites"].values() if "loss" in site]
        if losses:
            parts.append(f"loss {sum(losses) / len(losses):.3f}")
        spent = [site["privacy"]["epsilon"] for site in record["sites"].values() if "privacy" in site]
        if spent:
            parts.append(f"ε ≤ {max(spent):.2f}")
    parts += [f"{size(record['bytes_up'])} up", f"{size(record['bytes_down'])} down", f"{record['seconds']:.1f} s"]
    return "  ".join(parts)


def final_table(run: Mapping[str, Any]) -> Table:
    """Sites, records, accuracy before and after, what was promised to whom."""
    private = run["config"]["privacy"]["enabled"]
    unit = run["config"]["privacy"]["unit"]
    rounds = "1 round" if run["rounds"] == 1 else f"{run['rounds']} rounds"
    table = Table(title=Text(f"{run['name']}: {rounds} of {run['strategy']['name']}, {run['method']['name']}"))
    table.add_column("site")
    table.add_column("records", justify="right")
    if private and unit == "patient":
        table.add_column("patients", justify="right")
    table.add_column("accuracy before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("ε", justify="right")
    table.add_column("δ", justify="right")
    table.add_column("unit")
    for name, site in run["sites"].items():
        row = [name, f"{site['records']:,}"]
        if private and unit == "patient":
            row.append(f"{site['units']:,}")
        row += [percent(site["accuracy_before"]), percent(site["accuracy"])]
        row += [f"{site['epsilon']:.2f}", f"{site['delta']:g}", site["unit"]] if site["epsilon"] else ["none", "–", "–"]
        table.add_row(*row)
    spent = [site["epsilon"] for site in run["sites"].values() if site["epsilon"]]
    total = ["all", f"{sum(site['records'] for site in run['sites'].values()):,}"]
    if private and unit == "patient":
        total.append(f"{sum(site['units'] for site in run['sites'].values()):,}")
    total += [percent(run["accuracy"]["before"]), percent(run["accuracy"]["after"])]
    total += [f"≤ {max(spent):.2f}", "", ""] if spent else ["none", "", ""]
    table.add_section()
    table.add_row(*total, style="bold")
    return table


def closing_lines(run: Mapping[str, Any]) -> list[str]:
    """Cost and paths, below the table."""
    full = run["bytes_full_model"]
    up, down = run["bytes_up_round"], run["bytes_down_round"]
    lines = [
        f"A site's round: {size(up)} up, {size(down)} down; the full model would be {size(full)} each way "
        f"({full / max(1, up):,.0f} times the upload). {run['seconds']:.0f} s in all.",
        f"adapter  {run['adapter_path']}",
        f"report   {run['report_path']}",
    ]
    return [*(f"warning: {text}" for text in run["warnings"]), *lines]
