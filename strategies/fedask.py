"""FedASK: the rank-r part of the mean dW by two passes of sums, so that a secure sum serves it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState, LowRankPair, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean
from .local import LocalRule, Training
from .refactoring import part_of_site, refactored, require_factors
from .sketching import gaussian

_TRAINED = "fedask"


def sketch_y(pair: LowRankPair) -> str:
    """The name of Y_k = s_k B_k A_k Omega, (m, q)."""
    return f"{pair.b}.sketch"


def basis_q(pair: LowRankPair) -> str:
    """The name of Q, an orthonormal basis of the mean Y, (m, q)."""
    return f"{pair.b}.basis"


def sketch_p(pair: LowRankPair) -> str:
    """The name of P_k = (s_k B_k A_k)^T Q, (n, q)."""
    return f"{pair.a}.sketch"


class FedASKOptions(Options):
    """``q``: columns of the sketch; none: the ranks of all sites together, or what m and n allow, which is exact."""

    q: int | None = Field(None, ge=1)


@strategy("fedask")
class FedASK(Aggregator):
    """Y = sum p_k s_k B_k (A_k Omega), Q = qr(Y); P = sum p_k s_k A_k^T (B_k^T Q); U S V^T = SVD_r(P^T).

    Then B = Q U sqrt(S / s), A = sqrt(S / s) V^T. Omega (n, q) is Gaussian, drawn anew each round from a seed that all
    know. Both passes are sums, so the server needs no site's factors: A and B stay at the sites. Q P^T is the mean
    exactly if and only if q reaches its rank, which is at most the sum of the sites' ranks; then B A is what FlexLoRA
    gives, its best rank r. With q = r and an A that moves, more is lost than rank r must lose. (Where A is frozen and
    equal, the mean has rank r and q = r is enough: but then the row space of A never changes, see FedSVD.)

    What a site sends is computed from its trained adapter, so under privacy it is post-processing. Source: Wen et al.
    2025, "Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix", arXiv 2507.09990; there without s,
    and with one Omega for all rounds.
    """

    summary = (
        "two passes of sketches: Y = sum p_k B_k (A_k Omega), Q = qr(Y), P = sum p_k A_k^T (B_k^T Q), SVD_r(Q P^T)"
    )
    equation = "Y = sum p_k s_k B_k (A_k Omega); Q = qr(Y); P = sum p_k s_k A_k^T (B_k^T Q); B A = SVD_r(Q P^T) / s"
    source = "Wen et al. 2025, arXiv 2507.09990"
    capabilities = Capabilities(linear_sum=True, resets_state=True, heterogeneous_ranks=True, two_passes=True)
    Options = FedASKOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        factors = {name for pair in initial.spec.pairs for name in (pair.a, pair.b)}
        spec = initial.spec.with_policy("receive", lambda tensor: tensor.name in factors)
        sketches = [
            TensorSpec(sketch_y(pair), (len(initial[pair.b]), q), role="sketch", averaging="linear")
            for pair, q in self._widths(initial)
        ]
        spec = spec.with_extras((*initial.spec.extras, *sketches))
        empty = {sketch.name: _nothing(sketch.shape, sketch.dtype) for sketch in sketches}
        return AdapterState(spec, {**initial, **empty})

    def _widths(self, state: AdapterState) -> list[tuple[LowRankPair, int]]:
        """The columns that each pair's sketch has."""
        rank = state.spec.rank or max(len(state[pair.a]) for pair in state.spec.pairs)
        q = self.options.q or sum(self.ranks.values()) or rank
        return [(pair, min(q, len(state[pair.b]), state[pair.a].shape[1])) for pair in state.spec.pairs]

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return part_of_site(state, self.ranks, site)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return Sketching(training, memory)

    def start_round(self, state: AdapterState) -> None:
        self._state = state
        self._first, self._second = RunningMean(), RunningMean()

    def add(self, update: Update) -> None:
        self._first.add(update.state, update.weight)

    def second_pass(self) -> AdapterState:
        means = self._first.take()
        extras, bases = [], {}
        for pair in self._state.spec.pairs:
            mean = means[sketch_y(pair)]
            q, _ = np.linalg.qr(mean.astype(np.float64))
            bases[basis_q(pair)] = q.astype(mean.dtype)
            bases[sketch_p(pair)] = _nothing((self._state[pair.a].shape[1], q.shape[1]), mean.dtype)
            extras += [
                TensorSpec(basis_q(pair), q.shape, mean.dtype.name, "sketch", "linear", "freeze"),
                TensorSpec(sketch_p(pair), bases[sketch_p(pair)].shape, mean.dtype.name, "sketch", "linear"),
            ]
        spec = self._state.spec.with_policy("freeze", lambda tensor: tensor.policy == "share").with_extras(extras)
        own = {tensor.name: self._state[tensor.name] for tensor in spec.tensors if tensor.parameter}
        asked = AdapterState(spec, {**own, **bases})
        # Of the first pass nothing else is needed: Q, and the means of what is no sketch.
        self._bases = {pair.a: asked[basis_q(pair)] for pair in self._state.spec.pairs}
        sketches = {sketch_y(pair) for pair in self._state.spec.pairs}
        self._others = means.only(name for name in means if name not in sketches)
        self._first = RunningMean()
        return asked

    def add_refined(self, update: Update) -> None:
        self._second.add(update.state, update.weight)

    def result(self) -> AdapterState:
        projected = self._second.take()
        tensors = {**self._state, **self._others}
        for pair in self._state.spec.pairs:
            change = (self._bases[pair.a], projected[sketch_p(pair)].T)
            tensors |= refactored(pair, change, self._state, evenly=True)
        return AdapterState(self._state.spec, tensors).require_finite()


def _nothing(shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
    """Zeros that take no memory: the place of a tensor that only sites fill."""
    zero = np.zeros((), dtype)
    zero.flags.writeable = False
    return np.broadcast_to(zero, shape)


class Sketching(LocalRule):
    """The site's part of :class:`FedASK`: sketches of its own dW, the second one of what it remembers of the first."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState]) -> None:
        super().__init__(training, memory)
        self._trained: AdapterState | None = None

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        factors = [name for pair in trained.spec.pairs for name in (pair.a, pair.b)]
        self._trained = trained.only(factors)
        tensors = dict(trained)
        for number, pair in enumerate(received.spec.pairs):
            _, q = received.spec.by_name[sketch_y(pair)].shape
            a, b = trained[pair.a].astype(np.float64), trained[pair.b].astype(np.float64)
            omega = gaussian(a.shape[1], q, self.training.round, number)
            tensors[sketch_y(pair)] = (pair.scaling * (b @ (a @ omega))).astype(received[sketch_y(pair)].dtype)
        return AdapterState(received.spec, tensors)

    def remember(self) -> Mapping[str, AdapterState]:
        return {} if self._trained is None else {_TRAINED: self._trained}

    def refine(self, received: AdapterState) -> AdapterState:
        if _TRAINED not in self.memory:
            raise UserError("the site does not remember what it trained, so it cannot answer a second time")
        trained = self.memory[_TRAINED]
        answer = {}
        for pair, own in zip(received.spec.pairs, trained.spec.pairs, strict=True):
            q = received[basis_q(pair)].astype(np.float64)
            a, b = trained[own.a].astype(np.float64), trained[own.b].astype(np.float64)
            answer[sketch_p(pair)] = (own.scaling * (a.T @ (b.T @ q))).astype(received[sketch_p(pair)].dtype)
        return AdapterState(received.spec, answer, names=tuple(answer))
