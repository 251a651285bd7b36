"""What a person sees of a run in words: a line for each phase, and one table at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.config import RunConfig
from ..core.progress import Watch
from ..core.watching.screen import size

#: More sites than these are not all in the table at the end, but so many of the best and of the worst.
_ROWS, _ENDS = 30, 5


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


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
        missing = f", {len(record['missing']):,} missing" if record["missing"] else ""
        parts.append(f"{len(record['sites']):,} sites{missing}")
        losses = [site["loss"] for site in record["sites"].values() if "loss" in site]
        if losses:
            parts.append(f"loss {sum(losses) / len(losses):.3f}")
        spent = [site["privacy"]["epsilon"] for site in record["sites"].values() if "privacy" in site]
        if spent:
            parts.append(f"ε ≤ {max(spent):.2f}")
    parts += [f"{size(record['bytes_up'])} up, {size(record['bytes_down'])} down", f"{record['seconds']:.1f} s"]
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
    shown = _shown(run["sites"])
    for name, site in run["sites"].items():
        if name not in shown:
            continue
        row = [name, _count([site], "records")]
        if private and unit == "patient":
            row.append(_count([site], "units"))
        row += [percent(site["accuracy_before"]), percent(site["accuracy"])]
        row += [f"{site['epsilon']:.2f}", f"{site['delta']:g}", site["unit"]] if site["epsilon"] else ["none", "–", "–"]
        table.add_row(*row)
    spent = [site["epsilon"] for site in run["sites"].values() if site["epsilon"]]
    total = ["all", _count(run["sites"].values(), "records")]
    if private and unit == "patient":
        total.append(_count(run["sites"].values(), "units"))
    total += [percent(run["accuracy"]["before"]), percent(run["accuracy"]["after"])]
    total += [f"≤ {max(spent):.2f}", "", ""] if spent else ["none", "", ""]
    if len(shown) < len(run["sites"]):
        table.add_row(f"and {len(run['sites']) - len(shown):,} more", style="dim")
    table.add_section()
    table.add_row(*total, style="bold")
    return table


def _count(sites: Iterable[Mapping[str, Any]], key: str) -> str:
    """A count over all ``sites``; a dash where it stayed with them."""
    counts = [site[key] for site in sites]
    return "–" if None in counts else f"{sum(counts):,}"


def _shown(sites: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The sites that have a row: all of a few, else those of the best and the worst accuracy."""
    if len(sites) <= _ROWS:
        return set(sites)
    known = {name: site["accuracy"] for name, site in sites.items() if site["accuracy"] is not None}
    ranked = sorted(known, key=lambda name: (known[name], name)) or sorted(sites)
    return {*ranked[:_ENDS], *ranked[-_ENDS:]}


def closing_lines(run: Mapping[str, Any]) -> list[str]:
    """Cost and paths, below the table."""
    full = run["bytes_full_model"]
    up, down = run["bytes_up_round"], run["bytes_down_round"]
    lines = [
        f"A site's round: {size(up)} up, {size(down)} down; the full model would be {size(full)} each way "
        f"({full / max(1, up):,.0f} times the upload). {run['seconds']:.0f} s in all.",
        *_simulated(run),
        f"adapter  {run['adapter_path']}",
        f"report   {run['report_path']}",
    ]
    return [*(f"warning: {text}" for text in run["warnings"]), *lines]


def _simulated(run: Mapping[str, Any]) -> list[str]:
    """What only a simulation knows."""
    lines = []
    if run.get("virtual"):
        told = run["virtual"]
        lines.append(
            f"By the virtual clock: {told['seconds']:,.0f} s ({told['compute']:,.0f} s computing, "
            f"{told['down'] + told['up']:,.0f} s sending, {told['waiting']:,.0f} s waiting for late sites); "
            f"waited longest for {told['slowest']}."
        )
    if run.get("backdoor"):
        told = run["backdoor"]
        lines.append(
            f"Triggered records called `{told['target']}`: {percent(told['success_before'])} before, "
            f"{percent(told['success_after'])} after."
        )
    return lines
