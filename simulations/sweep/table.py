"""The one table of a sweep: a line a point of its grid, what the seeds say together, the best marked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from ..display import size
from .results import MEASURES, Group, Results
from .statistics import Estimate

_NOTHING = "–"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _epsilon(value: float) -> str:
    return f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


#: What is shown with its interval; of the rest the mean says enough.
_SPREAD = ("accuracy", "worst_site_accuracy")
#: Title, how a number is written, and what stands after it.
_COLUMNS: dict[str, tuple[str, Callable[[float], str], str]] = {
    "accuracy": ("accuracy", _percent, " %"),
    "worst_site_accuracy": ("worst site", _percent, " %"),
    "loss": ("loss", _number, ""),
    "epsilon": ("ε spent", _epsilon, ""),
    "bytes_up_site": ("up a site", size, ""),
    "seconds": ("seconds", _seconds, ""),
    "virtual_seconds": ("virtual s", _seconds, ""),
}


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def shown(measure: str, estimate: Estimate | None) -> str:
    """``51.2 ± 1.3 %``: the mean and half its interval, where there is one that is not nothing."""
    if estimate is None:
        return _NOTHING
    _, written, unit = _COLUMNS[measure]
    if estimate.half is None or measure not in _SPREAD:
        return f"{written(estimate.mean)}{unit}"
    return f"{written(estimate.mean)} ± {written(estimate.half)}{unit}"


def _settings(results: Results) -> list[tuple[str, Callable[[Group], str]]]:
    """The first columns: what the runs of a line have in common."""
    columns: list[tuple[str, Callable[[Group], str]]] = []
    for key in results.keys:
        leaf = key.rsplit(".", 1)[-1]
        title = leaf if [other.rsplit(".", 1)[-1] for other in results.keys].count(leaf) == 1 else key
        columns.append((title, lambda group, key=key: dict(group.values).get(key, _NOTHING)))  # type: ignore[misc]
    if any(group.baseline for group in results.groups) or not columns:
        columns.insert(0, ("baseline", lambda group: group.baseline or _NOTHING))
    return columns


def cells(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Titles, and the lines of the table."""
    settings = _settings(results)
    measures = [name for name in _COLUMNS if any(name in group.estimates for group in results.groups)]
    titles = [*(title for title, _ in settings), *(_COLUMNS[name][0] for name in measures), "n"]
    lines = []
    for group in results.groups:
        line = [Cell(value(group)) for _, value in settings]
        if group.refused and not group.finished:
            line += [Cell("refused"), *(Cell("") for _ in [*measures, "n"][1:])]
        else:
            line += [Cell(shown(name, group.estimates.get(name)), results.best(name, group)) for name in measures]
            line.append(
                Cell(str(group.finished) if group.finished == group.seeds else f"{group.finished}/{group.seeds}")
            )
        lines.append(line)
    return titles, lines


def notes(results: Results) -> list[str]:
    """What a reader of the table must know."""
    found = []
    counts = {group.finished for group in results.groups if group.finished}
    if counts - {1}:
        found.append("mean ± half of its 95 % confidence interval (Student's t over the n seeds)")
    if 1 in counts:
        found.append("one seed tells no interval (n = 1); give --seeds 3 or more to tell luck from merit")
    if any(results.best(name, group) for name in MEASURES for group in results.groups):
        found.append("marked is the best of the federations of the same promise, where its interval meets no other's")
    elif len([group for group in results.groups if not group.baseline]) > 1:
        found.append("nothing is marked as the best: no interval lies apart from all others of the same promise")
    found += [f"refused: {group.text}: {group.refused}" for group in results.groups if group.refused]
    found += [f"failed: {row['path']}: {row['error']}" for row in results.rows if row["status"] == "failed"]
    return found


def terminal_table(results: Results) -> Table:
    """For the terminal."""
    titles, lines = cells(results)
    first = len(_settings(results))
    table = Table(title=Text(results.name), box=box.SIMPLE_HEAD, title_justify="left")
    for index, title in enumerate(titles):
        table.add_column(Text(title), justify="left" if index < first else "right", no_wrap=index >= first)
    federations = [not group.baseline for group in results.groups]
    for index, line in enumerate(lines):
        if index and federations[index - 1] and not federations[index]:
            table.add_section()
        table.add_row(*(Text(f"{cell.text} *", style="bold green") if cell.best else Text(cell.text) for cell in line))
    return table


def markdown(results: Results) -> str:
    """For a file."""
    titles, lines = cells(results)
    rows = [[f"**{_plain(c.text)}**" if c.best else _plain(c.text) for c in line] for line in lines]
    table = [_line(map(_plain, titles)), _line("---" for _ in titles), *(_line(row) for row in rows)]
    return "\n".join([f"# {results.name}", "", *table, "", *(f"- {note}" for note in notes(results))]) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _line(parts: Iterable[str]) -> str:
    return "| " + " | ".join(parts) + " |"
