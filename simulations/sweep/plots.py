"""The pictures of a sweep: accuracy against the promise, against bytes, and over the rounds."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from ...server.report.charts import INK, MUTED, SERIES, STAND_INS, byte_text, drawing, inline
from ...server.report.style import CSS
from .results import Group, Results
from .statistics import Estimate, estimate

_SIZE = (8.0, 4.4)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2, 1, 2, 1, 2)))
_DOTS = (0, (1, 2))
#: The first colours are for federations; a baseline always has its own.
_FEDERATIONS = 6
_BASELINE_COLOURS = {"none": INK, "central": INK, "local": SERIES[7], "full": SERIES[6]}
#: Two seeds leave the mean so open that their interval would hide all others.
_SEEDS = 3
_BASELINES = {"none": "no training", "local": "each site alone", "central": "central", "full": "central, all weights"}
#: Keys that say what is promised, which has an axis or a dash of its own.
_PROMISE = ("privacy.epsilon", "privacy.enabled")
_CAP = 3.0
_LEGEND_WIDTH = 26


@dataclass(frozen=True)
class Series:
    """Groups that differ in their promise alone, and how they are drawn."""

    label: str
    groups: tuple[Group, ...]
    colour: str
    marker: str
    baseline: str

    @property
    def width(self) -> float:
        return 1.2 if self.baseline else 1.8


def series_of(results: Results) -> list[Series]:
    """One series a setting without its promise: federations first, in colours; baselines in grey tones of their own."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[Group]] = {}
    for group in results.groups:
        if group.curves and "accuracy" in group.estimates:
            settings = tuple((key, value) for key, value in group.values if key not in _PROMISE)
            found.setdefault((group.baseline, settings), []).append(group)
    # A key that has one value says nothing.
    varied = {key for key in results.keys if len({dict(settings).get(key) for base, settings in found if not base}) > 1}
    colours, markers = cycle(SERIES[:_FEDERATIONS]), cycle(_MARKERS)
    made = []
    for (baseline, settings), groups in found.items():
        told = [value if key in ("strategy", "run") else f"{key}={value}" for key, value in settings if key in varied]
        label = ", ".join([*([_BASELINES[baseline]] if baseline else []), *told]) or results.name or "federation"
        colour = _BASELINE_COLOURS[baseline] if baseline else next(colours)
        # There are more markers than colours: they tell two series of one colour apart.
        made.append(Series(label, tuple(groups), colour, next(markers), baseline))
    return made


def accuracy_by_epsilon(results: Results) -> Figure | None:
    """Accuracy after the run against the epsilon promised, with intervals; runs without privacy at the right."""
    series = series_of(results)
    if not series:
        return None
    promises = sorted({g.promise for s in series for g in s.groups if g.promise is not None})
    endless = any(g.promise is None and g.baseline != "none" for s in series for g in s.groups)
    low = math.log10(promises[0]) if promises else 0.0
    high = math.log10(promises[-1]) if promises else 0.0
    gap = max(0.22 * (high - low), 0.15)
    at_none = high + 1.6 * gap
    with _style("epsilon"):
        figure, axes = _canvas()
        for number, one in enumerate(series):
            # Side by side, or the intervals of two would hide each other.
            aside = (number - (len(series) - 1) / 2) * min(0.02 * (high - low + gap), 0.16 * gap)
            _promised(axes, one, lambda promise: at_none if promise is None else math.log10(promise), aside)
        ticks = [(math.log10(p), f"{p:g}") for p in promises]
        if endless:
            ticks.append((at_none, "no privacy"))
            if promises:
                axes.axvline(high + 0.8 * gap, color=MUTED, linewidth=0.6, linestyle=(0, (1, 3)))
        axes.xaxis.set_major_locator(FixedLocator([at for at, _ in ticks]))
        axes.set_xticklabels([text for _, text in ticks])
        axes.set_xlim((low if promises else at_none) - gap, (at_none if endless else high) + gap)
        axes.set_xlabel("privacy budget ε of each site (log scale)")
        _accuracy_axis(axes)
        _legend(axes, _handles(series))
        return figure


def _promised(axes: Axes, one: Series, place: Callable[[float | None], float], aside: float) -> None:
    if one.baseline == "none":
        _level(axes, one, _DOTS)
        return
    private = sorted((g for g in one.groups if g.promise is not None), key=lambda g: g.promise or 0.0)
    for groups in (private, [g for g in one.groups if g.promise is None]):
        points = [g.estimates["accuracy"] for g in groups]
        if points:
            axes.errorbar(
                [place(g.promise) + aside for g in groups],
                [point.mean for point in points],
                [_half(point) for point in points],
                color=one.colour,
                marker=one.marker,
                markersize=5.5,
                linewidth=one.width,
                linestyle=_DASHES[1] if one.baseline else "-",
                elinewidth=1.1,
                capsize=_CAP,
            )


def accuracy_by_bytes(results: Results) -> Figure | None:
    """Accuracy against what a site has sent, round by round; what sends nothing is a level line."""
    series = series_of(results)
    sending = [s for s in series if _sends(s)]
    if not sending:
        return None
    with _style("bytes"):
        figure, axes = _canvas()
        dashes = _dashes(sending)
        for one in sending:
            for number, group in enumerate(one.groups):
                _line(axes, one, group, dashes[group.promise], by_bytes=True, aside=1.015**number)
        silent = [one for one in series if one not in sending]
        for one in silent:
            _level(axes, one, _DOTS if one.baseline == "none" else None, dashes)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_text(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        _few_decades(axes)
        axes.set_xlabel("sent by a site in training, summed over the rounds (log scale)")
        _accuracy_axis(axes)
        _legend(axes, _handles(series, dashes, silent))
        return figure


def accuracy_by_round(results: Results) -> Figure | None:
    """Accuracy over the rounds, the mean of the seeds, with the 95 % intervals of the last at the right."""
    series = series_of(results)
    if not series:
        return None
    with _style("curves"):
        figure, axes = _canvas()
        dashes = _dashes(series)
        rounds = max(curve.rounds[-1] for one in series for group in one.groups for curve in group.curves)
        bars = 0
        for one in series:
            if one.baseline == "none":
                _level(axes, one, _DOTS)
                continue
            for group in one.groups:
                bars += not one.baseline
                _line(axes, one, group, dashes[group.promise], by_bytes=False, aside=0.015 * bars * rounds)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.set_xlabel("round")
        _accuracy_axis(axes)
        _legend(axes, _handles(series, dashes))
        return figure


PICTURES: Mapping[str, tuple[str, Callable[[Results], Figure | None]]] = {
    "accuracy-epsilon": ("Accuracy against the privacy budget", accuracy_by_epsilon),
    "accuracy-bytes": ("Accuracy against bytes sent", accuracy_by_bytes),
    "curves": ("Accuracy over the rounds", accuracy_by_round),
}


def _sends(one: Series) -> bool:
    # A baseline is no federation: what its one site tells itself is not sent.
    return not one.baseline and any(curve.sent[-1] > 0 for group in one.groups for curve in group.curves)


def _half(point: Estimate) -> float:
    return point.half or 0.0 if point.count >= _SEEDS else 0.0


def _level(axes: Axes, one: Series, dash: Any, dashes: Mapping[float | None, Any] | None = None) -> None:
    """The accuracy of each group of ``one`` as a level line, in ``dash`` or that of its promise."""
    for group in one.groups:
        own = dash or (dashes or {}).get(group.promise, "-")
        axes.axhline(group.estimates["accuracy"].mean, color=one.colour, linewidth=1, linestyle=own)


def _line(axes: Axes, one: Series, group: Group, dash: Any, *, by_bytes: bool, aside: float) -> None:
    """The mean of a group's seeds at each round that all have evaluated, and ``aside`` the interval of the last."""
    xs, points = [], list[Estimate]()
    for number in sorted(set.intersection(*(set(curve.rounds) for curve in group.curves))):
        at = [(curve, curve.rounds.index(number)) for curve in group.curves]
        found = estimate(curve.accuracy[index] for curve, index in at)
        x = sum(curve.sent[index] for curve, index in at) / len(at) if by_bytes else number
        # Before the first round nothing was sent, which a logarithm has no place for.
        if found is not None and (x > 0 or not by_bytes):
            xs.append(x)
            points.append(found)
    axes.plot(
        xs,
        [point.mean for point in points],
        color=one.colour,
        linewidth=one.width,
        linestyle=dash,
        marker=one.marker,
        markersize=4.0 if len(xs) <= 25 else 0.0,
    )
    if points and not one.baseline and _half(points[-1]):
        axes.errorbar(
            xs[-1] * aside if by_bytes else xs[-1] + aside,
            points[-1].mean,
            _half(points[-1]),
            color=one.colour,
            elinewidth=1.1,
            capsize=_CAP,
        )


def _dashes(series: Sequence[Series]) -> dict[float | None, Any]:
    """A dash for each promise: the weakest is drawn through, the stronger the shorter."""
    promises = {g.promise for one in series for g in one.groups if one.baseline != "none"}
    order = sorted(promises, key=lambda promise: -(math.inf if promise is None else promise))
    return dict(zip(order, cycle(_DASHES), strict=False))


def _handles(
    series: Sequence[Series], dashes: Mapping[float | None, Any] | None = None, level: Sequence[Series] = ()
) -> list[Line2D]:
    """The legend: what the colours and markers are, then what the dashes are where there are several."""
    found = []
    for one in series:
        dotted = one.baseline == "none"
        found.append(
            Line2D(
                [],
                [],
                color=one.colour,
                linewidth=one.width,
                linestyle=_DOTS if dotted else _DASHES[1] if one.baseline and dashes is None else "-",
                marker="" if dotted or one in level else one.marker,
                markersize=5,
                label=_broken(one.label),
            )
        )
    if dashes is not None and len(dashes) > 1:
        for promise, dash in dashes.items():
            label = "no privacy" if promise is None else f"ε = {promise:g}"
            found.append(Line2D([], [], color=MUTED, linewidth=1.4, linestyle=dash, label=label))
    return found


@contextmanager
def _style(name: str) -> Iterator[None]:
    """That of all charts; names from a grid are plain text, whatever they hold."""
    with drawing(f"sweep-{name}"), matplotlib.rc_context({"text.parse_math": False, "font.size": 10}):
        yield


def _broken(label: str) -> str:
    """``label`` in lines that leave room for the picture."""
    return textwrap.fill(re.sub(r",(?=\S)", ", ", label), _LEGEND_WIDTH)


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _accuracy_axis(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0, max(high, low + 0.02)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1, symbol=" %"))
    axes.set_ylabel("accuracy on held-out records")


def _few_decades(axes: Axes) -> None:
    """Ticks that a person can read between, where the values span no power of ten."""
    low, high = axes.get_xlim()
    if math.log10(high / low) < 1.5:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        labelcolor=INK,
        handlelength=2.6,
        borderaxespad=0,
    )


def as_element(figure: Figure, name: str) -> str:
    """``figure`` as an ``<svg>`` inside a page, of which no other is called ``name``."""
    with _style(name):
        return inline(figure)


def as_file(figure: Figure) -> str:
    """``figure`` as an SVG file that any viewer shows: on white, in the light colours of the reports."""
    light = dict(re.findall(r"(--\w+):(#[0-9a-f]{3,6})", CSS.partition("@media")[0]))
    figure.set_facecolor(light["--paper"])
    buffer = io.StringIO()
    with _style("file"):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.set_facecolor("none")
    stand_ins = {colour: light[name[4:-1]] for colour, name in STAND_INS.items()}
    return re.sub("|".join(stand_ins), lambda found: stand_ins[found[0]], buffer.getvalue())
