"""Where the time of a profiled run went: a bar a round, and all rounds together as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from . import charts
from . import elements as el
from .record import Record

#: The sections of a profile that one colour stands for.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "clip and noise": ("clip", "noise"),
    "optimizer": ("optimizer",),
    "evaluation": ("evaluation",),
    "load and data": ("load", "data"),
    "wire and gate": ("wire", "gate"),
    "aggregate, disk, report": ("aggregate", "disk", "report"),
}
_REST = "rest"


def times(record: Record) -> str:
    """The chart and the table; nothing for a run that was not profiled."""
    profile = record.profile
    if profile is None or not profile["rounds"]:
        return ""
    several = profile["processes"] > 1
    rounds = [_grouped(row, several) for row in profile["rounds"]]
    names = [name for name in (*GROUPS, _REST) if any(row.get(name) for row in rounds)]
    figure = el.figure(
        _chart([row["round"] for row in profile["rounds"]], rounds, names),
        "Seconds by round",
        f'<span class="legend">{"".join(map(_key, names))}</span>{_caption(profile)}',
        "wide",
    )
    return f'<div class="charts">{figure}</div>{_table(profile)}'


def _caption(profile: Mapping[str, Any]) -> str:
    start = "A round goes from the start of its training to the start of the next; round 0 is what comes before."
    if profile["processes"] > 1:
        start += f" Seconds of {profile['processes']} processes are added up, so that a bar is longer than its round."
    return start


def _grouped(row: Mapping[str, Any], several: bool) -> dict[str, float]:
    """Seconds of a round by group, and of what was in none, which only the clock of a single process tells."""
    spent = {name: float(told["seconds"]) for name, told in row["sections"].items()}
    found = {group: sum(spent.get(name, 0.0) for name in names) for group, names in GROUPS.items()}
    return found if several else {**found, _REST: max(0.0, row["seconds"] - sum(spent.values()))}


def _chart(numbers: list[int], rounds: list[dict[str, float]], names: list[str]) -> str:
    with charts.drawing("times"):
        figure, axes = charts.canvas(charts.WIDE, [dict.fromkeys(numbers, 0.0)])
        axes.set_xlim(min(numbers) - 0.7, max(numbers) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        bottom = [0.0] * len(numbers)
        for name in names:
            heights = [row.get(name, 0.0) for row in rounds]
            axes.bar(numbers, heights, bottom=bottom, color=_colour(name), width=0.8)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_ylabel("seconds")
        return charts.inline(figure)


def _colour(name: str) -> str:
    return charts.MUTED if name == _REST else charts.SERIES[list(GROUPS).index(name)]


def _key(name: str) -> str:
    return f'<span><i style="background:{charts.STAND_INS[_colour(name)]}"></i>{name}</span>'


def _table(profile: Mapping[str, Any]) -> str:
    wall, trainings = float(profile["seconds"]), int(profile["trainings"])
    spent = {el.text(name): float(told["seconds"]) for name, told in profile["sections"].items()}
    if profile["processes"] == 1:
        spent[_REST] = max(0.0, wall - sum(spent.values()))
    rows = [
        (name, f"{seconds:.2f}", el.percent(seconds / wall) if wall else "–", _each(seconds, trainings))
        for name, seconds in (*spent.items(), ("wall", wall))
    ]
    return el.table(("section", "seconds", "of the wall time", "ms a site's round"), rows, "sites")


def _each(seconds: float, trainings: int) -> str:
    return f"{1000 * seconds / trainings:.2f}" if trainings else "–"
