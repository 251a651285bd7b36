"""FLoRA: the sites' factors stacked, their product added to the base weights, and the adapter begun anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from ..core.adapter import AdapterState, offset_a, offset_b
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .lowrank import Factors, svd
from .refactoring import OtherTensors, factor_pairs, part_of_site, require_factors, require_whole_pairs

#: Singular values below this share of what was added up are what rounding made of a zero.
_NOTHING = 1e-10


class StackedSum:
    """sum_k w_k b_k a_k of one shape (m, n), as factors: nothing is lost, and memory is flat in the number of terms.

    The stack [w_1 b_1 ...] [a_1; ...] is folded by a QR of its shorter side when its rank has come to twice min(m, n),
    to a rank of min(m, n); so it never grows beyond that.
    """

    def __init__(self, m: int, n: int) -> None:
        self._left: list[np.ndarray] = [np.zeros((m, 0))]
        self._right: list[np.ndarray] = [np.zeros((0, n))]
        self._most = 2 * min(m, n)
        self.rank = 0
        # No less than the norm of any partial sum: what there is to round.
        self._size = 0.0

    def add(self, weight: float, b: np.ndarray, a: np.ndarray) -> None:
        left, right = weight * b.astype(np.float64), a.astype(np.float64)
        self._left.append(left)
        self._right.append(right)
        self.rank += len(right)
        self._size += float(np.linalg.norm(left) * np.linalg.norm(right))
        if self.rank > self._most:
            self._fold()

    def factors(self) -> Factors:
        """The sum as b (m, rank) and a (rank, n)."""
        if len(self._left) > 1:
            self._left = [np.concatenate(self._left, axis=1)]
            self._right = [np.concatenate(self._right, axis=0)]
        return self._left[0], self._right[0]

    def least(self, rank: int | None = None) -> Factors:
        """The sum in factors of the lowest rank, the singular values shared by both; at most ``rank``, if given.

        Only a cap of ``rank`` loses anything; what it keeps is the best of that rank.
        """
        u, s, vt = svd(*self.factors(), rank)
        keep = s > _NOTHING * self._size
        root = np.sqrt(s[keep])
        return u[:, keep] * root, root[:, None] * vt[keep]

    def _fold(self) -> None:
        left, right = self.factors()
        if len(left) <= right.shape[1]:
            q, t = np.linalg.qr(left)
            left, right = q, t @ right
        else:
            q, t = np.linalg.qr(right.T)
            left, right = left @ t.T, q.T
        self._left, self._right = [left], [right]
        self.rank = len(right)


def changes_of(state: AdapterState) -> dict[str, StackedSum]:
    """What ``state`` adds to the base weights, by each pair's ``a``, to add more to."""
    found = {}
    for pair in state.spec.pairs:
        found[pair.a] = total = StackedSum(len(state[pair.b]), state[pair.a].shape[1])
        if offset_a(pair) in state:
            total.add(1.0, state[offset_b(pair)], state[offset_a(pair)])
    return found


def with_changes(
    state: AdapterState, changes: Mapping[str, Factors], tensors: Mapping[str, np.ndarray]
) -> AdapterState:
    """``state`` with other ``tensors``, and exactly ``changes`` of the base weights."""
    spec = state.spec.with_offset({name: len(right) for name, (_, right) in changes.items()})
    new: dict[str, np.ndarray] = {**state, **tensors}
    for pair in spec.pairs:
        if pair.a in changes:
            new[offset_b(pair)], new[offset_a(pair)] = changes[pair.a]
    return AdapterState(
        spec, {t.name: np.asarray(new[t.name]).astype(t.dtype, copy=False) for t in spec.tensors}
    ).require_finite()


class FLoRAOptions(Options):
    """``seed``: what the factors A of each round are drawn from."""

    seed: int = 0


@strategy("flora")
class FLoRA(Aggregator):
    """W0 += sum p_k s_k B_k A_k, with p_k = w_k / sum w; then A is drawn anew and B = 0.

    Stacked factors: [p_1 s_1 B_1 ...] [A_1; ...] is the mean of the sites' dW, whatever their ranks: exact. The server
    keeps the change of W0 as factors over all rounds and sends it whole, so that a site that misses rounds is right
    when it comes back; its rank grows by at most sum r_k a round and never beyond min(m, n), and directions that are
    zero are dropped. A is uniform in +-1/sqrt(n), as LoRA draws it, equal everywhere; a site of rank r_k takes the
    first r_k rows. Since B = 0 at the start of each round, the first local step moves B alone, so short rounds learn
    slowly. An adapter that the run starts from goes to W0 whole. Heads and biases are averaged. Source: Wang et al.
    2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", arXiv
    2409.05976.
    """

    summary = "W0 += sum p_k s_k B_k A_k by stacked factors, then A drawn anew and B = 0; ranks may differ"
    equation = "W0 += [p_1 s_1 B_1 ... p_K s_K B_K] [A_1; ...; A_K], p_k = w_k / sum w; A ~ U(-1, 1)/sqrt(n), B = 0"
    source = "Wang et al. 2024, arXiv 2409.05976"
    capabilities = Capabilities(
        needs_individual=True, touches_base=True, resets_state=True, heterogeneous_ranks=True, exact=True
    )
    Options = FLoRAOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        if not any(initial[pair.b].any() for pair in initial.spec.pairs):
            return initial
        # A site of a smaller rank would get a part of it only.
        totals = changes_of(initial)
        for pair in initial.spec.pairs:
            totals[pair.a].add(pair.scaling, initial[pair.b], initial[pair.a])
        zero = {pair.b: np.zeros_like(initial[pair.b]) for pair in initial.spec.pairs}
        return with_changes(initial, {name: total.least() for name, total in totals.items()}, zero)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return part_of_site(state, self.ranks, site)

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        self._sums = {pair.a: StackedSum(len(state[pair.b]), state[pair.a].shape[1]) for pair in state.spec.pairs}

    def add(self, update: Update) -> None:
        pairs = list(factor_pairs(update, self._state))
        self._others.add(update)
        for pair, own in pairs:
            self._sums[pair.a].add(update.weight * own.scaling, update.state[pair.b], update.state[pair.a])

    def result(self) -> AdapterState:
        tensors = self._others.result()
        totals = changes_of(self._state)
        for pair in self._state.spec.pairs:
            new = self._sums[pair.a]
            if new.rank:
                totals[pair.a].add(1 / self._others.weight, *new.factors())
                tensors[pair.a] = self._drawn(pair.a)
                tensors[pair.b] = np.zeros_like(self._state[pair.b])
        return with_changes(self._state, {name: total.least() for name, total in totals.items()}, tensors)

    def _drawn(self, name: str) -> np.ndarray:
        rank, n = self._state[name].shape
        seed = hashlib.sha256(f"{self.options.seed}|{self.round}|{name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(seed[:16])).uniform(-1, 1, (rank, n)) / np.sqrt(n)
