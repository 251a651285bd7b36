"""The ROC of an attack as a picture, on logarithmic axes: what matters is who is named with few false alarms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ...core.errors import UserError
from .lira import dp_tpr

_COLOURS = ("#0b6fb8", "#d05a00", "#00896a", "#b04f8c")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the PNG. Raises :class:`UserError` where that cannot be done."""
    figure = Figure(figsize=(7.2, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Left of one false alarm there is nothing to see.
    least = min(1 / max(curve["others"], 1) for curve in report["curves"])
    grid = np.geomspace(least, 1, 300)
    axes.plot(grid, grid, color="#8a8f98", linewidth=1, linestyle=(0, (4, 3)), label="guessing")
    for colour, curve in zip(_COLOURS, report["curves"], strict=False):
        fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
        label = f"{curve['name']}: AUC {curve['auc']:.3f} ± {curve['auc_error']:.3f}"
        axes.step(
            np.maximum(fpr, least), np.maximum(tpr, least / 10), color=colour, linewidth=1.8, where="post", label=label
        )
        if curve["private"]:
            bound = dp_tpr(grid, curve["epsilon"], curve["delta"])
            text = f"the most that ε {curve['epsilon']:.2f}, δ {curve['delta']:g} leaves any attack"
            axes.plot(grid, bound, color=colour, linewidth=1.1, linestyle=":", label=text)
            axes.fill_between(grid, bound, 1, color=colour, alpha=0.06, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.15))
    axes.set_xlabel(f"share of {report['unit']}s wrongly named as members (FPR)")
    axes.set_ylabel("share of members named (TPR)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.grid(color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    what = "the run's adapter" if report["target"] == "run" else "the run's recipe, each model in turn"
    axes.set_title(f"Membership inference by {report['shadows']} shadow federations on {what}", fontsize=10.5)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
