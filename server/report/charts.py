"""The charts of a report as inline SVG. They hold numbers and fixed words only: no name from the data enters an SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

Points = Mapping[int, float]
"""A value by round."""

Spreads = Mapping[int, Sequence[float]]
"""Least, lower quartile, median, upper quartile and largest value of all sites by round."""
_NONE: Spreads = {}

COLOURED_SITES = 8
"""With more sites than these colours could tell apart, every site is a thin grey line."""

# Matplotlib knows no CSS variables: it draws in these stand-ins, and `inline` puts the variables in their place, so
# that one drawing follows the page between light and dark.
STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--bad)",
    **{f"#0505{index:02x}": f"var(--s{index})" for index in range(COLOURED_SITES)},
}
INK, MUTED, RULE, BAD, *SERIES = STAND_INS
#: How very many sites spread is shaded in this.
SPREAD_COLOUR = SERIES[0]
SPREAD = STAND_INS[SPREAD_COLOUR]

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
WIDE, HALF = (10.0, 3.1), (4.9, 3.0)


def site_colour(index: int, count: int) -> str:
    """The CSS colour of site number ``index`` among ``count`` in the charts."""
    return STAND_INS[_site_stand_in(index, count)]


def byte_text(count: float) -> str:
    """``count`` bytes as a person reads it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def accuracy_chart(overall: Points, sites: Mapping[str, Points], spreads: Spreads = _NONE) -> str:
    """Accuracy by round: every site, or how very many spread, and over them in bold the whole federation."""
    with drawing("accuracy"):
        largest = {number: quartiles[-1] for number, quartiles in spreads.items()}
        figure, axes = canvas(WIDE, [overall, largest, *sites.values()])
        _site_lines(axes, sites)
        _bands(axes, spreads)
        if overall:
            _bold(axes, overall, f"{overall[max(overall)]:.1%}".replace("%", " %"))
        highest = max(
            (value for points in (overall, largest, *sites.values()) for value in points.values()), default=0.0
        )
        axes.set_ylim(0, min(highest * 1.08, 1.02) or 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        return inline(figure)


def epsilon_chart(sites: Mapping[str, Points], budget: float | None, label: str, spreads: Spreads = _NONE) -> str:
    """Epsilon spent by round at every site, or how very many spread, and the budget.

    ``label`` is written at the end of the highest line.
    """
    with drawing("epsilon"):
        rounds = {number for points in sites.values() for number in points}
        largest = {number: max(points[number] for points in sites.values() if number in points) for number in rounds}
        largest |= {number: spreads[number][-1] for number in sorted(spreads)}
        figure, axes = canvas(HALF, [largest])
        _site_lines(axes, sites)
        _bands(axes, spreads)
        if largest:
            if spreads or len(sites) > COLOURED_SITES:
                _bold(axes, largest, label)
            else:
                _end_label(axes, largest, label)
        top = max(largest.values(), default=0.0)
        if budget is not None:
            top = max(top, budget)
            axes.axhline(budget, color=BAD, linewidth=1.1, linestyle=(0, (5, 3)), zorder=3)
            axes.annotate(
                f"budget {budget:g}",
                (0, budget),
                xycoords=("axes fraction", "data"),
                xytext=(2, 4),
                textcoords="offset points",
                color=BAD,
            )
        axes.set_ylim(0, top * 1.15 or 1)
        return inline(figure)


def bytes_chart(up: Points, down: Points, full: Points) -> str:
    """Bytes by round over all sites, each way, beside what the whole model would take; on a logarithmic scale."""
    up, down, full = ({number: value for number, value in points.items() if value > 0} for points in (up, down, full))
    with drawing("bytes"):
        figure, axes = canvas(HALF, [up, down, full])
        axes.set_yscale("log")
        marker = _marker_size(max(map(len, (up, down, full))))
        # Often the two all but coincide: the wider line below still shows.
        axes.plot([*down], [*down.values()], color=SERIES[1], linewidth=3.2, marker="s", markersize=marker * 1.9)
        axes.plot([*up], [*up.values()], color=SERIES[0], linewidth=1.2, marker="o", markersize=marker)
        alone: dict[str, Any] = {"marker": "_", "markersize": 40} if len(full) == 1 else {}
        axes.plot([*full], [*full.values()], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), **alone)
        _full_model_note(axes, up, down, full)
        values = [value for points in (up, down, full) for value in points.values()]
        if values:
            axes.set_ylim(min(values) / 3, max(values) * 3)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_text(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return inline(figure)


def _full_model_note(axes: Axes, up: Points, down: Points, full: Points) -> None:
    """Name the whole model's line, and how far below it the adapter's busier direction lies."""
    if not full:
        return
    middle = sorted(full)[len(full) // 2]
    axes.annotate(
        f"full model {byte_text(full[middle])}", (middle, full[middle]), (0, 5), textcoords="offset points", ha="center"
    )
    adapter = max(up.get(middle, 0.0), down.get(middle, 0.0))
    if not adapter or full[middle] < 2 * adapter:
        return
    axes.annotate(
        "",
        (middle, adapter),
        (middle, full[middle]),
        arrowprops={"arrowstyle": "<->", "color": MUTED, "linewidth": 0.8, "shrinkA": 3, "shrinkB": 5},
    )
    axes.annotate(
        f"{full[middle] / adapter:,.0f} × less",
        (middle, (adapter * full[middle]) ** 0.5),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=MUTED,
    )


def drawing(name: str) -> AbstractContextManager[None]:
    """The style of all charts; the salt makes the ids of an SVG the same every time and its own on the page."""
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"fedgraft-{name}"})


def canvas(size: tuple[float, float], series: Iterable[Points]) -> tuple[Figure, Axes]:
    """An empty chart whose x axis spans the rounds of all ``series``."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    rounds = sorted({number for points in series for number in points}) or [0]
    pad = (rounds[-1] - rounds[0]) * 0.025 or 0.5
    axes.set_xlim(rounds[0] - pad, rounds[-1] + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12 if size == WIDE else 7, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    return figure, axes


def _site_stand_in(index: int, count: int) -> str:
    return SERIES[index] if count <= COLOURED_SITES else MUTED


def _marker_size(points: int) -> float:
    return 3.5 if points <= 20 else 0.0


def _site_lines(axes: Axes, sites: Mapping[str, Points]) -> None:
    many = len(sites) > COLOURED_SITES
    for index, points in enumerate(sites.values()):
        axes.plot(
            [*points],
            [*points.values()],
            color=_site_stand_in(index, len(sites)),
            linewidth=0.5 if many else 1.2,
            alpha=0.4 if many else 1.0,
            # A line of one point is seen by its marker alone; thousands of markers are only weight.
            marker="o" if not many or len(points) == 1 else "",
            markersize=2.0 if many else _marker_size(len(points)),
        )


def _bands(axes: Axes, spreads: Spreads) -> None:
    """From the least to the largest, and darker the half in the middle."""
    rounds = sorted(spreads)
    for lower, upper, opacity, width in ((0, 4, 0.2, 1.5), (1, 3, 0.35, 5.0)):
        low, high = ([spreads[number][at] for number in rounds] for at in (lower, upper))
        if len(rounds) > 1:
            axes.fill_between(rounds, low, high, color=SPREAD_COLOUR, alpha=opacity, linewidth=0)
        elif rounds:
            axes.vlines(rounds, low, high, color=SPREAD_COLOUR, alpha=opacity, linewidth=width)


def _bold(axes: Axes, points: Points, label: str) -> None:
    """The line that matters most, its last value written at its end."""
    marker = _marker_size(len(points)) * 1.4
    axes.plot([*points], [*points.values()], color=INK, linewidth=2.6, marker="o", markersize=marker, zorder=4)
    _end_label(axes, points, label)


def _end_label(axes: Axes, points: Points, label: str) -> None:
    last = max(points)
    axes.annotate(
        label,
        (last, points[last]),
        (8, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        annotation_clip=False,
    )


def inline(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element that can stand inside an HTML page and scales with it."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style element would reach over the whole page, and the ids that nothing refers to would clash between charts.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}"|m[0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r"#0[1-5]0[1-5]0[0-9a-f]", lambda found: STAND_INS[found[0]], svg)
    return svg.strip()
