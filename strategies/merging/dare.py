"""DARE: drop changes at random and scale up the rest, before adapters are averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from ...core.adapter import AdapterState
from ..aggregator import Options
from ..lowrank import Factors, stacked
from .elementwise import blocks, by_rows, entries
from .merger import Adapter, Context, Merged, Merger, merger
from .mixing import alone, assembled, changes, mean_rest, require_products, shares, started


class DareOptions(Options):
    """``density`` is the share of numbers that is kept, ``scale`` is lambda, ``on`` says which numbers are dropped."""

    density: float = Field(
        0.5, gt=0, le=1, description="each number is kept with this probability d, and divided by it"
    )
    scale: float = Field(1.0, gt=0, description="lambda, times the mean of the changes")
    on: Literal["product", "factors"] = Field("product", description="drop entries of dW (the paper), or of A and B")


@merger("dare")
class Dare(Merger):
    """dW = lambda sum_k p_k (m_k * dW_k) / d, with m_k in {0, 1} at random, 1 with probability d for each entry.

    The expectation over masks is the weighted mean. The paper drops entries of the full change, which leaves a matrix
    of full rank; it is cut to the nearest of the result's rank, and that takes most of the randomness out again. ``on
    = factors`` drops entries of A and of B, each divided by d, which leaves the rank as it is and the expectation too
    (the two masks are independent), with more variance. Masks are a function of the seed, the adapter's name and the
    place, so the order of adapters does not matter. Source: Yu et al. 2024, "Language models are super Mario",
    arXiv 2311.03099, section 3.
    """

    summary = "drop entries of dW at random, rescale, mean"
    equation = "dW = lambda sum_k p_k (m_k * dW_k) / d, m_k ~ Bernoulli(d)"
    source = "Yu et al. 2024, arXiv 2311.03099"
    Options = DareOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p, density = shares(adapters), self.options.density
        if len(adapters) == 1:
            return alone(adapters[0], context)
        reasons = {a.name: f"its weight; {density:.0%} of its numbers kept, times {1 / density:g}" for a in adapters}
        rest = mean_rest(adapters, p, context)
        if self.options.on == "factors":
            state, lost = self._by_factors(adapters, p, rest, context)
            return Merged(state, p, reasons, lost)
        merged, cuts = {}, {}
        for pair in context.spec.pairs:
            held = changes(adapters, pair, context)
            sources = [_stream(context.seed, adapter.name, pair.a) for adapter in adapters]
            cuts[pair.a] = blocks(held[0][0].shape[0], held[0][1].shape[1], 2)
            merged[pair.a] = partial(_rows, held, list(p.values()), sources, density)
        state, lost = by_rows(merged, cuts, self.options.scale, rest, context)
        return Merged(state, p, reasons, lost)

    def _by_factors(
        self, adapters: Sequence[Adapter], p: Mapping[str, float], rest: Mapping[str, np.ndarray], context: Context
    ) -> tuple[AdapterState, float]:
        density, products = self.options.density, {}
        for pair in context.spec.pairs:
            terms = []
            for adapter, (b, a) in zip(adapters, changes(adapters, pair, context), strict=True):
                masks = [
                    _mask(_stream(context.seed, adapter.name, name), 0, x.shape, density)
                    for name, x in ((pair.b, b), (pair.a, a))
                ]
                terms.append((self.options.scale * p[adapter.name], b * masks[0] / density, a * masks[1] / density))
            start = started(pair, context)
            products[pair.a] = stacked(terms if start is None else [*terms, (1.0, *start)])
        return assembled(context.spec, products, rest)


def _stream(seed: int, adapter: str, tensor: str) -> int:
    """The seed of one adapter's mask for one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{adapter}|{tensor}".encode()).digest()[:16], "big")


def _mask(source: int, row: int, shape: tuple[int, ...], density: float) -> np.ndarray:
    """The mask of some rows of a matrix, the same in whatever blocks it is asked for: one draw an entry."""
    bits = np.random.PCG64(source).advance(row * shape[1])
    return np.random.Generator(bits).random(shape) < density


def _rows(
    held: Sequence[Factors], p: Sequence[float], sources: Sequence[int], density: float, cut: slice
) -> np.ndarray:
    total = np.zeros((cut.stop - cut.start, held[0][1].shape[1]))
    for x, share, source in zip(held, p, sources, strict=True):
        total += share / density * _mask(source, cut.start, total.shape, density) * entries(x, cut)
    return total
