"""Task arithmetic: the sum of what the adapters change, times one number."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ...core.adapter import AdapterState
from ..aggregator import Options
from .merger import Adapter, Context, Merged, Merger, merger
from .mixing import alone, released, require_products, shares, weighted

#: What the authors of TIES (arXiv 2306.01708, section 4) take where there is nothing to choose it by.
WITHOUT_VALIDATION = 0.4
GRID = tuple(round(0.1 * step, 1) for step in range(1, 11))


class ArithmeticOptions(Options):
    """``scale`` is lambda; left out, the best of 0.1 to 1.0 where adapters can be scored, else 0.4."""

    scale: float | None = Field(None, gt=0, description="lambda; left out: 0.4, or the best of 0.1 to 1 by the score")


@merger("task-arithmetic")
class TaskArithmetic(Merger):
    """dW = lambda sum_k w'_k dW_k, with w'_k = K p_k, which is 1 for equal weights; every other tensor is averaged.

    The task vector tau_k of a low-rank adapter is its dW, so the sum is exact up to the rank of the result. What else
    trains (a head, a bias) has no common zero to add from, so it is averaged. Without a scale and a score lambda is
    0.4, and 1 for a single adapter, which comes back as itself. Source: Ilharco et al. 2023, "Editing models with task
    arithmetic", arXiv 2212.04089, section 3.
    """

    summary = "lambda times the sum of the products dW"
    equation = "dW = lambda sum_k K p_k dW_k"
    source = "Ilharco et al. 2023, arXiv 2212.04089"
    Options = ArithmeticOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p = shares(adapters)
        if len(adapters) == 1 and self.options.scale is None:
            return alone(adapters[0], context)
        scale = self.options.scale
        notes: tuple[str, ...] = ()
        if scale is None and context.score is not None:
            tried = {value: context.score(_scaled(adapters, p, value, context)[0]) for value in GRID}
            scale = max(tried, key=lambda value: (tried[value], -value))
            notes = (
                f"lambda = {scale:g}, the best of {GRID[0]:g} to {GRID[-1]:g} by the score ({tried[scale]:.4f})",
                released(f"the {context.labels} labelled records"),
            )
        elif scale is None:
            scale = WITHOUT_VALIDATION
            notes = (f"lambda = {scale:g}, for want of records to choose it by",)
        state, lost = _scaled(adapters, p, scale, context)
        weights = {name: scale * len(p) * share for name, share in p.items()}
        return Merged(state, weights, dict.fromkeys(p, f"lambda {scale:g} times its weight"), lost, notes)


def _scaled(
    adapters: Sequence[Adapter], p: dict[str, float], scale: float, context: Context
) -> tuple[AdapterState, float]:
    return weighted(adapters, {name: scale * len(p) * share for name, share in p.items()}, context)
