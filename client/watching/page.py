"""A site as a page in the terminal, for the people of the site."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...core.watching.screen import age, bar, size
from .snapshot import Budget, Line, SiteView

_WORDS = {True: ("connected", "green"), False: ("not connected", "red"), None: ("", "")}


def site_page(view: SiteView) -> RenderableType:
    """All that the site's files say."""
    rows: list[RenderableType] = [_head(view)]
    if view.trouble:
        rows.append(Text(view.trouble, style="red", overflow="fold"))
    rows += [_last(view.last), _counts("answered", view.answered), _counts("refused", _by_kind(view.refused))]
    rows.append(Text(f"{size(view.bytes_out)} left the site, {size(view.disk_free)} of disk free", style="dim"))
    if view.budgets:
        rows += [Text(""), _budgets(view.budgets)]
    if view.refusals:
        rows.append(Text("\nlast refusals", style="dim"))
        rows += [_refusal(line) for line in reversed(view.refusals)]
    return Group(*rows)


def _head(view: SiteView) -> Text:
    worker = (f"worker {view.worker}", "green") if view.worker else ("no worker", "red")
    return Text.assemble((view.name, "bold"), f" of {view.federation}  ", worker, "  ", _WORDS[view.connected])


def _last(line: Line | None) -> Text:
    if line is None:
        return Text("nothing was asked yet")
    what = "answered" if line.event == "left" else "refused"
    about = f" of {line.run} round {line.round}" if line.run else ""
    return Text(f"last: {line.kind}{about} {what} {age(line.time)} ago")


def _counts(word: str, counts: Mapping[str, int]) -> Text:
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return Text(f"{word}: {text or 'nothing'}", style="yellow" if word == "refused" and counts else "")


def _by_kind(refused: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {f"{kind} by the policy" if reason == "policy" else kind: count for (kind, reason), count in refused.items()}


def _budgets(budgets: tuple[Budget, ...]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(*(Text(head, style="dim") for head in ("dataset", "", "budget (epsilon)")))
    for budget in budgets:
        span = "this year" if budget.year else "in all"
        if budget.trouble:
            table.add_row(Text(budget.dataset), Text("unknown", style="red"), Text(budget.trouble, style="red"))
            continue
        text = f"{budget.left:.2f} left of {budget.allowed:g} {span}, at delta {budget.delta:g}"
        table.add_row(Text(budget.dataset), bar(budget.spent / budget.allowed), Text(text))
    return table


def _refusal(line: Line) -> Text:
    return Text.assemble((f"{age(line.time)} ago ", "dim"), f"{line.kind}: ", (line.why, "yellow"), overflow="fold")
