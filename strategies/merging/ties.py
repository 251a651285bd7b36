"""TIES: trim what changed little, elect a sign for each entry, average those that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from ..aggregator import Options
from ..lowrank import Factors
from .elementwise import blocks, by_rows, entries, smallest_kept, trimmed
from .merger import Adapter, Context, Merged, Merger, merger
from .mixing import alone, changes, mean_rest, require_products, shares


class TiesOptions(Options):
    """``density`` is the share of entries that the trim keeps, and ``scale`` is lambda."""

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that are kept")
    scale: float = Field(1.0, gt=0, description="lambda, times the merged change")
    trim: Literal["adapter", "matrix"] = Field("adapter", description="rank entries over the whole adapter, or a layer")


@merger("ties")
class Ties(Merger):
    """TIES-Merging on dW: keep the largest entries of each dW_k, elect signs, take the mean of those that agree.

    t_k = dW_k where |dW_k| is among the ``density`` largest of all its layers, else 0; g = sgn(sum_k p_k t_k); dW =
    lambda sum_k p_k t_k [sgn t_k = g] / sum_k p_k [sgn t_k = g]. The paper's rule on task vectors, which for low-rank
    adapters are dW, not the factors: a sign of A alone means nothing, as (A, B) and (-A, -B) are one change. Entries
    are made from the factors in blocks of rows. What comes out has full rank, and is cut to the nearest of the
    result's rank. Noise for differential privacy is spread over all entries alike, and makes the trim a lottery.
    Source: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708, section 3 (lambda = 1 and 20 % as there).
    """

    summary = "trim small entries of dW, elect signs, mean of those that agree"
    equation = "t_k = top(dW_k); g = sgn(sum p_k t_k); dW = lambda sum p_k t_k [sgn t_k = g] / sum p_k [sgn t_k = g]"
    source = "Yadav et al. 2023, arXiv 2306.01708"
    Options = TiesOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        held = {pair.a: changes(adapters, pair, context) for pair in context.spec.pairs}
        election = Election(p, held, self.options.density, self.options.trim)
        merged = {name: partial(election.rows, name) for name in held}
        state, lost = by_rows(merged, election.cuts, self.options.scale, mean_rest(adapters, p, context), context)
        return Merged(state, p, election.reasons(), lost)

    def warning(self, private: bool) -> str:
        if not private:
            return ""
        return (
            f"rule `{self.name}` keeps the largest entries and elects signs; the noise of differential privacy is "
            "alike in all entries, so it decides much of both: compare with `uniform`"
        )


class Election:
    """Trim, elect and average matrices given as factors, whose entries are made in blocks of rows.

    ``held`` maps a name to the K matrices that are merged under it, in the order of the shares ``p``; ``trim`` says
    whether entries are ranked over all names or under each.
    """

    def __init__(
        self,
        p: Mapping[str, float],
        held: Mapping[str, Sequence[Factors]],
        density: float,
        trim: Literal["adapter", "matrix"],
    ) -> None:
        self._p, self._held, self._density = p, held, density
        self.cuts = {name: blocks(xs[0][0].shape[0], xs[0][1].shape[1], len(p)) for name, xs in held.items()}
        self._least: dict[str, list[float]] = {}
        together = [list(held)] if trim == "adapter" else [[name] for name in held]
        for names in together:
            least = [
                smallest_kept([(held[name][k], self.cuts[name]) for name in names], density) for k in range(len(p))
            ]
            self._least |= dict.fromkeys(names, least)
        self._counts: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, name: str, cut: slice) -> np.ndarray:
        """sum_k p_k t_k [sgn t_k = g] / sum_k p_k [sgn t_k = g] in some rows; zero where nobody has the sign g."""
        kept = np.stack(
            [trimmed(entries(x, cut), least) for x, least in zip(self._held[name], self._least[name], strict=True)]
        )
        p = np.array(list(self._p.values()))[:, None, None]
        agree = kept * np.sum(p * kept, axis=0) > 0
        # Blocks may be made more than once; each counts once.
        self._counts[name, cut.start] = np.stack([np.sum(agree, axis=(1, 2)), np.sum(kept != 0, axis=(1, 2))])
        share = np.sum(p * agree, axis=0)
        return np.divide(np.sum(p * kept * agree, axis=0), share, out=np.zeros_like(share), where=share > 0)

    def reasons(self) -> dict[str, str]:
        """What became of each adapter's entries, once all blocks were made."""
        agreed, kept = sum(self._counts.values(), np.zeros((2, len(self._p)), dtype=np.int64))
        return {
            name: f"largest {self._density:.0%} of its entries, {agreed[k] / max(1, kept[k]):.0%} of them with the "
            "elected sign"
            for k, name in enumerate(self._p)
        }
