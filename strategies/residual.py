"""Strategies that average the factors, and add to the base weights what that misses: FedEx-LoRA and FRLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState, LowRankPair, explain_shape
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .refactoring import OtherTensors, factor_pairs, require_factors, require_whole_pairs
from .stacking import StackedSum, changes_of, with_changes


def equal_pairs(update: Update, state: AdapterState) -> Iterator[tuple[LowRankPair, LowRankPair]]:
    """:func:`factor_pairs`, of factors that have the rank of ``state``; raises :class:`UserError` for another."""
    for pair, own in factor_pairs(update, state):
        if (got := update.state[pair.a].shape) != state[pair.a].shape:
            raise UserError(f"{update.site}: {explain_shape(pair.a, got, state[pair.a].shape)}")
        yield pair, own


class FactorMeans:
    """The mean A and the mean B of each pair, in float64: what is left of a difference must not be their rounding."""

    def __init__(self, state: AdapterState) -> None:
        self._sums = {name: np.zeros(state[name].shape) for pair in state.spec.pairs for name in (pair.a, pair.b)}
        self._weights = dict.fromkeys(self._sums, 0.0)

    def add(self, update: Update, pair: LowRankPair) -> None:
        for name in (pair.a, pair.b):
            self._sums[name] += update.weight * update.state[name].astype(np.float64)
            self._weights[name] += update.weight

    def result(self) -> dict[str, np.ndarray]:
        """The means by name, of the factors that came."""
        return {name: self._sums[name] / weight for name, weight in self._weights.items() if weight}


class _Averaged(Aggregator):
    """What both share: the mean of every tensor, streamed."""

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        self._means = FactorMeans(state)

    def add(self, update: Update) -> None:
        pairs = list(equal_pairs(update, self._state))
        self._others.add(update)
        for pair, own in pairs:
            self._means.add(update, pair)
            self._add_pair(update, pair, own)

    def _add_pair(self, update: Update, pair: LowRankPair, own: LowRankPair) -> None:
        """Take in one pair of factors beside their means."""


class FedExOptions(Options):
    """``max_rank``: the most that the change of a base weight may come to; what is beyond is lost. 0: as it comes."""

    max_rank: int = Field(0, ge=0)


@strategy("fedex")
class FedEx(_Averaged):
    """A = sum p_k A_k, B = sum p_k B_k, and W0 += s (sum p_k B_k A_k - B A), with p_k = w_k / sum w.

    Exact: what FedIT misses goes to the base weights. Its rank grows by up to (K - 1) r a round, never beyond min(m,
    n), and it is kept and sent whole as factors, so that a site that misses rounds is right when it comes back. With
    ``max_rank`` the best change of that rank is kept and the strategy is not exact, which its capabilities then say.
    Heads and biases are averaged. Source: Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and
    Efficient Fine-Tuning of Foundation Models", arXiv 2410.09432; there without s and p_k, which are needed.
    """

    summary = "A = sum p_k A_k, B = sum p_k B_k, W0 += s (sum p_k B_k A_k - B A)"
    equation = "A = sum_k p_k A_k; B = sum_k p_k B_k; W0 += s (sum_k p_k B_k A_k - B A), p_k = w_k / sum w"
    source = "Singhal et al. 2025, arXiv 2410.09432"
    capabilities = Capabilities(needs_individual=True, touches_base=True, exact=True)
    Options = FedExOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if self.options.max_rank:
            vars(self)["capabilities"] = replace(self.capabilities, exact=False)

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self._sums = {pair.a: StackedSum(len(state[pair.b]), state[pair.a].shape[1]) for pair in state.spec.pairs}

    def _add_pair(self, update: Update, pair: LowRankPair, own: LowRankPair) -> None:
        self._sums[pair.a].add(update.weight * own.scaling, update.state[pair.b], update.state[pair.a])

    def result(self) -> AdapterState:
        means = self._means.result()
        totals = changes_of(self._state)
        for pair in self._state.spec.pairs:
            if pair.a in means:
                totals[pair.a].add(1 / self._others.weight, *self._sums[pair.a].factors())
                totals[pair.a].add(-pair.scaling, means[pair.b], means[pair.a])
        changes = {name: total.least(self.options.max_rank or None) for name, total in totals.items()}
        return with_changes(self._state, changes, {**self._others.result(), **means})


class FRLoRAOptions(Options):
    """``factors``: where those of each round's start come from: ``principal`` of the base weights, or the ``initial``
    ones, as the method made them or the run's ``start_from`` has them.
    """

    factors: Literal["principal", "initial"] = "principal"


@strategy("frlora")
class FRLoRA(_Averaged):
    """W0 += s (B A - B0 A0), with A = sum p_k A_k and B = sum p_k B_k; then A = A0 and B = B0 again.

    A0 = sqrt(S / s) V^T and B0 = U sqrt(S / s) are the principal part of the first base weight, U S V^T = SVD_r(W0); so
    that this part is not there twice, the base weights begin at W0 - s B0 A0. Every round all sites start from the same
    factors, which keeps them together, and the sum of the rounds has any rank. The decomposition is computed once,
    where W0 is (the server's copy of the base model, before the first round), and sent as the adapter's factors and the
    change of the base weights; the aggregator sees factors alone. Not exact: like FedIT it takes the mean of the
    factors, not of their product. Needs only sums of the updates. Heads and biases are averaged. Source: Yan et al.
    2025, "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025.
    """

    summary = "W0 += s (B A - B0 A0) of the mean factors, then A = A0, B = B0, the principal part of W0"
    equation = "A = sum_k p_k A_k; B = sum_k p_k B_k; W0 += s (B A - B0 A0); A, B = A0, B0 with s B0 A0 = SVD_r(W0)"
    source = "Yan et al. 2025, ICLR 2025"
    capabilities = Capabilities(linear_sum=True, touches_base=True, resets_state=True)
    Options = FRLoRAOptions
    #: The suite has no base weights to decompose.
    contract_options: Mapping[str, Any] = {"factors": "initial"}

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        if self.options.factors == "initial":
            return initial
        if self.principal is None:
            raise UserError(
                "strategy `frlora` begins at the principal part of the base weights, which are not at hand here; set "
                "strategy_options.factors = initial"
            )
        tensors = self.principal(initial)
        totals = changes_of(initial)
        for pair in initial.spec.pairs:
            totals[pair.a].add(pair.scaling, initial[pair.b], initial[pair.a])
            totals[pair.a].add(-pair.scaling, tensors[pair.b], tensors[pair.a])
        return with_changes(initial, {name: total.least() for name, total in totals.items()}, tensors)

    def result(self) -> AdapterState:
        means = self._means.result()
        totals = changes_of(self._state)
        for pair in self._state.spec.pairs:
            if pair.a in means:
                totals[pair.a].add(pair.scaling, means[pair.b], means[pair.a])
                totals[pair.a].add(-pair.scaling, self._state[pair.b], self._state[pair.a])
        return with_changes(self._state, {name: total.least() for name, total in totals.items()}, self._others.result())
