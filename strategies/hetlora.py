"""HetLoRA: factors of mixed ranks, padded with zeros and averaged; sites prune ranks that they do not use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .local import LocalRule, Training
from .lowrank import norm
from .refactoring import OtherTensors, factor_pairs, part_of_site, require_factors, require_whole_pairs

_RANK = "hetlora-rank"
_MEMORY = AdapterSpec(_RANK, (TensorSpec("rank", (1,), dtype="float64", policy="local"),))


class HetLoRAOptions(Options):
    """``gamma``: the share of a site's rank that a pruning leaves (1: none is done); ``penalty``: lambda of the penalty
    on the tail; both are tuned in the paper. ``by_records``: a site's records count beside its norm.
    """

    gamma: float = Field(0.99, gt=0, le=1)
    penalty: float = Field(0.0, ge=0)
    by_records: bool = True


@strategy("hetlora")
class HetLoRA(Aggregator):
    """B = sum p_k [s_k / s B_k, 0], A = sum p_k [A_k; 0], with p_k proportional to w_k |s_k B_k A_k|_F, pair by pair.

    Factors are padded with zeros to the largest rank; a site receives the first r_k rows and columns. Not exact, for
    any ranks: it averages factors. Published without w_k, which ``by_records = false`` gives; a pair in which all
    norms are zero is averaged by w_k alone. Rows of A that no site sent keep the server's values: their column of B is
    zero, so dW is the rule's, and a slice that is zero on both sides could never train again.

    At the site, with tail = the slices from gamma r_k on: the loss gets lambda |B_tail| |A_tail| per pair
    (``penalty``), and if the sum of these products over the pairs ends smaller than it began, the site's rank is pruned
    to gamma r_k for good: its tail is zero from then on. It still sends those zeros, which ``server.entropy_coding``
    makes small. All of this is computed from the adapter alone, so under privacy it is post-processing.

    Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv
    2401.06432.
    """

    summary = "factors padded with zeros, averaged with weights |B_k A_k|_F; sites prune unused ranks"
    equation = "A = sum_k p_k [A_k; 0], B = sum_k p_k [s_k / s B_k, 0], p_k ~ w_k |s_k B_k A_k|_F; site k: first r_k"
    source = "Cho et al. 2024, arXiv 2401.06432"
    capabilities = Capabilities(needs_individual=True, heterogeneous_ranks=True)
    Options = HetLoRAOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return part_of_site(state, self.ranks, site)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return SelfPruning(training, memory, self.options.gamma, self.options.penalty)

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        # Two sums of each factor, by norm and by records: which of them counts is known at the end.
        self._sums = {pair.a: [_PaddedSum(state, pair.a, pair.b) for _ in range(2)] for pair in state.spec.pairs}

    def add(self, update: Update) -> None:
        pairs = list(factor_pairs(update, self._state))
        self._others.add(update)
        for pair, own in pairs:
            a, b = update.state[pair.a], update.state[pair.b]
            scale = own.scaling / pair.scaling
            size = own.scaling * norm((b, a))
            by_norm, by_records = self._sums[pair.a]
            by_norm.add(size * (update.weight if self.options.by_records else 1.0), scale, b, a)
            by_records.add(update.weight, scale, b, a)

    def result(self) -> AdapterState:
        tensors = self._others.result()
        for pair in self._state.spec.pairs:
            by_norm, by_records = self._sums[pair.a]
            chosen = by_norm if by_norm.weight > 0 else by_records
            if chosen.weight:
                a, b = chosen.result(self._state[pair.a])
                tensors[pair.a] = a.astype(self._state[pair.a].dtype)
                tensors[pair.b] = b.astype(self._state[pair.b].dtype)
        names = [name for name in self._state.spec.names if name in tensors]
        return AdapterState(self._state.spec, tensors, names=names).require_finite()


class _PaddedSum:
    """Weighted sums of A and B, padded with zeros, and the weight of all."""

    def __init__(self, state: AdapterState, a: str, b: str) -> None:
        self.a, self.b = np.zeros(state[a].shape), np.zeros(state[b].shape)
        self.weight, self._most = 0.0, 0

    def add(self, weight: float, scale: float, b: np.ndarray, a: np.ndarray) -> None:
        rank = len(a)
        self.a[:rank] += a.astype(np.float64) * weight
        self.b[:, :rank] += b.astype(np.float64) * (weight * scale)
        self.weight += weight
        self._most = max(self._most, rank)

    def result(self, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a = self.a / self.weight
        a[self._most :] = before[self._most :]
        return a, self.b / self.weight


class SelfPruning(LocalRule):
    """The site's part of :class:`HetLoRA`: a penalty on the tail of the ranks, and pruning of a tail that shrank.

    The penalty's gradient for B is lambda |A_tail| B_tail / |B_tail|, and for A the same with the letters changed; the
    other factor's norm is that of the step before where it has not been seen in this one.
    """

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], gamma: float, penalty: float) -> None:
        super().__init__(training, memory)
        self._gamma, self._penalty = gamma, penalty
        self._rank: int | None = int(memory[_RANK]["rank"][0]) if _RANK in memory else None

    def begin(self, received: AdapterState, loss: Any = None) -> AdapterState:
        spec = received.spec
        most = spec.rank or max((len(received[pair.a]) for pair in spec.pairs), default=0)
        self._rank = most if self._rank is None else min(self._rank, most)
        self._kept = max(1, int(self._gamma * self._rank))
        self._partner = {pair.a: pair.b for pair in spec.pairs} | {pair.b: pair.a for pair in spec.pairs}
        self._is_a = {pair.a for pair in spec.pairs}
        state = self._cut(received, self._rank)
        self._sizes = self._tails(state)
        self._before = self._tail(spec, self._sizes)
        return state

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        if name not in self._partner or self._rank is None:
            return gradient
        turned = gradient + 0
        tail = slice(self._kept, self._rank)
        if self._penalty and self._kept < self._rank:
            part = value[tail] if name in self._is_a else value[:, tail]
            size = float((part * part).sum()) ** 0.5
            self._sizes[name] = size
            if size:
                push = part * (self._penalty * self._sizes[self._partner[name]] / size)
                if name in self._is_a:
                    turned[tail] += push
                else:
                    turned[:, tail] += push
        if name in self._is_a:
            turned[self._rank :] = 0
        else:
            turned[:, self._rank :] = 0
        return turned

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        if self._rank is None:
            raise UserError("the site's rank is not known before its training begins")
        if self._kept < self._rank and self._tail(trained.spec, self._tails(trained)) < self._before:
            self._rank = self._kept
        return self._cut(trained, self._rank)

    def remember(self) -> Mapping[str, AdapterState]:
        if self._rank is None:
            return {}
        return {_RANK: AdapterState(_MEMORY, {"rank": np.array([float(self._rank)])})}

    def _tails(self, state: AdapterState) -> dict[str, float]:
        """The norm of the tail of every factor."""
        sizes = {}
        for name in self._partner:
            factor = state[name] if name in self._is_a else state[name].T
            sizes[name] = float(np.linalg.norm(factor[self._kept : self._rank].astype(np.float64)))
        return sizes

    @staticmethod
    def _tail(spec: AdapterSpec, sizes: Mapping[str, float]) -> float:
        return sum(sizes[pair.a] * sizes[pair.b] for pair in spec.pairs)

    @staticmethod
    def _cut(state: AdapterState, rank: int) -> AdapterState:
        """``state`` with zeros in all slices from ``rank`` on."""
        tensors = dict(state)
        for pair in state.spec.pairs:
            a, b = state[pair.a].copy(), state[pair.b].copy()
            a[rank:], b[:, rank:] = 0, 0
            tensors |= {pair.a: a, pair.b: b}
        return AdapterState(state.spec, tensors, names=tuple(state))
