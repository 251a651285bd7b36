"""What each site holds, as a picture: one bar a site, one colour a class."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...core.errors import UserError
from .tally import Tally

#: So many sites have a bar of their own; of more, sizes are drawn by rank and the mixes of so many.
_BARS = 40
_SUFFIXES = (".png", ".svg", ".pdf")


def draw(tally: Tally, title: str, path: Path) -> None:
    """Write ``path`` (PNG, SVG or PDF by its ending). Raises :class:`UserError` where that cannot be done."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--output {path}: a picture ends in {', '.join(_SUFFIXES)}")
    # The same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedgraft", "axes.spines.top": False, "axes.spines.right": False}):
        figure = (_few if len(tally.sites) <= _BARS else _many)(tally)
        if len(tally.classes) > 1:
            figure.legend(
                *figure.axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7
            )
        figure.suptitle(title, fontsize=10.5)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _few(tally: Tally) -> Figure:
    sites, classes = tally.train.shape
    figure = _figure(1.6 + 0.26 * max(sites, classes / 2))
    axes = figure.add_subplot()
    _stack(axes, tally, tally.train)
    names = [f"{site}  ({why})" if why else site for site, why in zip(tally.sites, tally.shifts, strict=True)]
    axes.set_yticks(np.arange(sites), names, fontsize=8)
    axes.set_xlabel("training records")
    return figure


def _many(tally: Tally) -> Figure:
    figure = _figure(4.8)
    left, right = figure.subplots(1, 2)
    sizes = tally.train.sum(1)
    order = np.argsort(-sizes, kind="stable")
    left.plot(np.arange(1, len(order) + 1), sizes[order], color="#0b6fb8")
    left.set(xscale="log", yscale="log", xlabel=f"rank of {len(order):,} sites by size", ylabel="training records")
    left.grid(color="#e3e6ea", linewidth=0.7)
    shown = order[np.linspace(0, len(order) - 1, _BARS).round().astype(int)]
    _stack(right, tally, tally.train[shown] / sizes[shown, None])
    right.set(yticks=[], xlabel="share of each class", ylabel=f"{_BARS} of the sites, the largest on top")
    return figure


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _stack(axes: Axes, tally: Tally, table: np.ndarray) -> None:
    """One bar a row of ``table``, one part of it a class."""
    colours = matplotlib.colormaps["tab20" if len(tally.classes) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    places, start = np.arange(len(table)), np.zeros(len(table))
    for number, name in enumerate(tally.classes):
        label, colour = name if len(name) < 30 else f"{name[:28]}…", colours[number % len(colours)]
        axes.barh(
            places,
            table[:, number],
            left=start,
            height=0.8,
            color=colour,
            label=label,
            edgecolor="white",
            linewidth=0.4,
        )
        start = start + table[:, number]
    axes.invert_yaxis()
