"""A run as a page in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...core.watching.screen import age, bar, clock, size, sparkline
from .deployment import KitView
from .snapshot import RunView, SiteView

#: More sites than these are not all on the page: those that gave nothing come first.
_ROWS = 20
#: Columns that a cell has at most.
_NAME = 20
_STYLES = {"running": "green", "finished": "green", "starting": "yellow", "stopped": "red", "failed": "red"}
_WORDS = {"train": "training", "evaluate": "evaluating"}


def run_page(view: RunView) -> RenderableType:
    """All that is known of a run."""
    if view.status == "absent":
        return Text(f"{view.folder}: no run here yet", overflow="fold")
    rows: list[RenderableType] = [_head(view)]
    if view.error:
        rows.append(Text(view.error, style="red", overflow="fold"))
    if view.status == "stopped":
        rows.append(Text("its process is gone; what it had reached is kept, and the run can be resumed", style="red"))
    if view.accuracy or view.loss:
        rows.append(_curves(view))
    if view.run:
        rows.append(_costs(view))
    if view.sites:
        rows += [Text(""), _sites(view)]
    return Group(*rows)


def _head(view: RunView) -> Text:
    line = Text.assemble((view.name, "bold"), "  ", (view.status, _STYLES.get(view.status, "")))
    if view.rounds:
        line.append(f"  round {view.round} of {view.rounds}")
    if view.phase is not None:
        what = _WORDS.get(view.phase.kind, view.phase.kind)
        line.append(f"  {what} at {view.phase.sites:,} sites, {clock(view.phase_seconds())}")
    return line


def _curves(view: RunView) -> Text:
    line = Text()
    if view.accuracy:
        line.append(f"accuracy {100 * view.accuracy[-1]:.1f} % ").append(sparkline(view.accuracy), "cyan").append("   ")
    if view.loss:
        line.append(f"loss {view.loss[-1]:.3f} ").append(sparkline(view.loss), "cyan")
    return line


def _costs(view: RunView) -> Text:
    parts = [f"{clock(view.spent)} so far"]
    if view.left is not None:
        parts.append(f"about {clock(view.left)} left")
    parts += [f"{size(view.bytes_up)} up", f"{size(view.bytes_down)} down", view.strategy]
    return Text(", ".join(part for part in parts if part), style="dim")


def _sites(view: RunView) -> RenderableType:
    asked = any(site.connected is not None for site in view.sites)
    heads = ["site", *(["now"] if asked else []), "heard", "rounds", "steps"]
    heads += ["epsilon"] if view.epsilon is not None else []
    shown = sorted(view.sites, key=lambda site: (not site.why, site.name))[:_ROWS]
    rows = [[Text(head, style="dim") for head in [*heads, "missed"]]]
    rows += [_row(view, site, asked) for site in sorted(shown, key=lambda site: site.name)]
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(heads)):
        widest = max(row[column].cell_len for row in rows)
        # What was missed gives way, in lines of its own.
        table.add_column(no_wrap=True, overflow="ellipsis", min_width=min(widest, _NAME), max_width=_NAME)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    if len(view.sites) == len(shown):
        return table
    missing = sum(1 for site in view.sites if site.why)
    return Group(table, Text(f"and {len(view.sites) - len(shown):,} more sites; {missing:,} in all gave nothing last"))


def _row(view: RunView, site: SiteView, asked: bool) -> list[Text]:
    row = [Text(site.name)]
    if asked:
        online = site.connected
        row.append(Text("online" if online else "offline", style="green" if online else "red"))
    row += [Text(age(site.heard)), Text(f"{site.answered}/{site.asked}"), Text(str(site.steps))]
    if view.epsilon is not None:
        spent = site.epsilon or 0.0
        row.append(Text.assemble(bar(spent / view.epsilon, 6), f" {spent:.2f} of {view.epsilon:g}"))
    counts = ", ".join(f"{count} {fault}" for fault, count in site.missed.items())
    row.append(Text("; ".join(part for part in (counts, site.why) if part), style="yellow"))
    return row


def kit_page(view: KitView) -> RenderableType:
    """The server of a kit, and its latest job."""
    state = ("does not answer", "red") if view.trouble else ("up", "green")
    rows: list[RenderableType] = [Text.assemble((view.federation, "bold"), "  server ", state)]
    if view.trouble:
        rows.append(Text(view.trouble, style="red", overflow="fold"))
    elif view.sites:
        online = [name for name, here in sorted(view.sites.items()) if here]
        rows.append(Text(f"{len(online)} of {len(view.sites)} sites online: {', '.join(online)}", overflow="fold"))
    for why, count in view.refused.items():
        rows.append(Text(f"refused {count}: {why}", style="yellow", overflow="fold"))
    if view.refused:
        at, address = view.last_refused
        rows.append(Text(f"the last {age(at)} ago, from {address}", style="dim"))
    rows += [Text(""), run_page(view.job) if view.job is not None else Text("no job yet")]
    return Group(*rows)
