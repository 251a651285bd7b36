"""What each site holds, as a picture: one bar a site, one colour a class."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...core.errors import UserError
from .tally import Tally

#: So many sites have a bar with a name; more stand side by side, the largest first.
_NAMED = 40
_SUFFIXES = (".png", ".svg", ".pdf")


def draw(tally: Tally, title: str, path: Path) -> None:
    """Write ``path`` (PNG, SVG or PDF by its ending). Raises :class:`UserError` where that cannot be done."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--output {path}: a picture ends in {', '.join(_SUFFIXES)}")
    sites, classes = tally.train.shape
    many = sites > _NAMED
    # The same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedgraft"}):
        size = (9, 4.5) if many else (9, 1.6 + 0.26 * max(sites, classes / 3))
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["tab20" if classes > 10 else "tab10"].colors  # type: ignore[attr-defined]
        order = np.argsort(-tally.train.sum(1), kind="stable") if many else np.arange(sites)
        start = np.zeros(sites)
        for number, name in enumerate(tally.classes):
            counts = tally.train[order, number]
            bars = {"color": colours[number % len(colours)], "label": name if len(name) < 30 else f"{name[:28]}…"}
            if many:
                axes.bar(np.arange(sites), counts, bottom=start, width=1.0, linewidth=0, **bars)
            else:
                axes.barh(np.arange(sites), counts, left=start, height=0.8, edgecolor="white", linewidth=0.4, **bars)
            start += counts
        if many:
            axes.set(xlabel=f"{sites:,} sites, the largest first", ylabel="training records", xlim=(-0.5, sites - 0.5))
        else:
            names = [f"{site}  ({why})" if why else site for site, why in zip(tally.sites, tally.shifts, strict=True)]
            axes.set_yticks(np.arange(sites), names, fontsize=8)
            axes.invert_yaxis()
            axes.set_xlabel("training records")
        if classes > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_title(title, fontsize=10.5)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
