"""Model soups: the mean of the adapters, or of those that a validation set lets in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ..aggregator import Options
from .merger import Adapter, Context, Merged, Merger, Needs, merger
from .mixing import alone, lifted, mean_rest, released, shares, weighted, written


class SoupOptions(Options):
    """``on``: average the products B A, or the factors A and B apart."""

    on: Literal["product", "factors"] = Field("product", description="average dW = s B A (exact), or A and B apart")


@merger("uniform")
class UniformSoup(Merger):
    """dW = sum_k p_k dW_k, p_k = w_k / sum w, and the mean of every other tensor.

    The paper averages whole models, W0 + dW_k, which is the mean of the products: exact up to the rank of the result,
    for adapters of any rank. ``on = factors`` averages A and B apart, as federated averaging does: not exact (mean(B)
    mean(A) is not mean(B A)), and of use only to adapters of one rank that started from one seed, but it works under a
    secure sum. Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2.
    """

    summary = "mean of the products dW"
    equation = "dW = sum_k p_k dW_k"
    source = "Wortsman et al. 2022, arXiv 2203.05482"
    Options = SoupOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        total = sum(adapter.weight for adapter in adapters)
        reasons = {adapter.name: f"weight {adapter.weight:g} of {total:g}" for adapter in adapters}
        if self.options.on == "factors":
            return Merged(_mean_of_factors(adapters, p, context), p, reasons)
        state, lost = weighted(adapters, p, context)
        return Merged(state, p, reasons, lost)


def _mean_of_factors(adapters: Sequence[Adapter], p: dict[str, float], context: Context) -> AdapterState:
    """A = sum p_k A_k and B = sum p_k s_k B_k / s, for adapters of one rank."""
    tensors = mean_rest(adapters, p, context)
    for pair in context.spec.pairs:
        for adapter in adapters:
            rank = next((adapter.state[x.a].shape[0] for x in adapter.state.spec.pairs if x.a == pair.a), 0)
            if rank != context.spec.by_name[pair.a].shape[0]:
                raise UserError(
                    f"adapter {adapter.name}: has rank {rank} at {pair.a}; rule `uniform` with on = factors needs the "
                    "rank of the result everywhere: leave out on = factors"
                )
        states = [(p[adapter.name], lifted(adapter.state, context.spec)) for adapter in adapters]
        for name in (pair.a, pair.b):
            tensors[name] = np.sum([w * state[name].astype(np.float64) for w, state in states], axis=0)
    return written(context.spec, tensors)


@merger("greedy")
class GreedySoup(Merger):
    """The mean over a set S that grows from the best: k joins where score(mean(S + k)) >= score(mean(S)).

    Adapters are tried in the order of their scores alone; means are of the products, weighted as in ``uniform``. Each
    adapter is scored by itself, so it must be seen. Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482,
    recipe 1.
    """

    summary = "mean of those that do not lower the score, tried from the best down"
    equation = "S = {best}; S += k if score(mean(S + k)) >= score(mean(S)); dW = mean over S"
    source = "Wortsman et al. 2022, arXiv 2203.05482"
    needs = Needs(score=True, labels=True)

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        shares(adapters)
        if context.score is None:
            raise UserError("rule `greedy` scores adapters; give it records with labels")
        single = {adapter.name: context.score(lifted(adapter.state, context.spec)) for adapter in adapters}
        order = sorted(adapters, key=lambda adapter: (-single[adapter.name], adapter.name))
        chosen = [order[0]]
        best = single[order[0].name]
        reasons = {order[0].name: f"best alone: {best:.4f}"}
        for adapter in order[1:]:
            candidate = sorted((*chosen, adapter), key=adapters.index)
            score = context.score(weighted(candidate, shares(candidate), context)[0])
            said = f"{single[adapter.name]:.4f} alone, {score:.4f} in the mean"
            if score >= best:
                chosen, best = candidate, score
                reasons[adapter.name] = f"joined: {said}"
            else:
                reasons[adapter.name] = f"left out: {said}, below {best:.4f}"
        p = shares(chosen)
        state, lost = weighted(chosen, p, context)
        return Merged(
            state,
            {adapter.name: p.get(adapter.name, 0.0) for adapter in adapters},
            {adapter.name: reasons[adapter.name] for adapter in adapters},
            lost,
            (f"score {best:.4f}", released(f"the {context.labels} labelled records")),
        )
