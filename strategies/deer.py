"""DEeR: factors train in turn, and the one at rest is orthonormal, so that noise reaches dW undistorted."""

from __future__ import annotations

import numpy as np

from ..core.adapter import AdapterState, LowRankPair
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, strategy
from .alternating import with_factors_at_rest
from .averaging import RunningMean
from .refactoring import require_factors


@strategy("deer")
class DEeR(Aggregator):
    """Deviation eliminator: B in odd rounds, A in even ones, as RoLoRA, so that the mean is exact in each round.

    Noise regulator: noise W (m, n) is to reach dW as W P, with P the projection on the rows of A, whatever the size of
    A. The published code adds W A^T (A A^T)^-1 to the clipped change of B, weaker where A is large: that hides a change
    whose |dB A| is bounded, and the bound on |dB| gives that only while no singular value of A exceeds 1. Here the
    factor at rest is made orthonormal instead,

        A = L Q, Q Q^T = 1:   (B, A) -> (B L, Q)     before rounds that train B, and likewise for A,

    which leaves dW as it is. Clipped gradients and plain noise N of B then give dW the noise s N Q, in distribution
    that of the paper's, and the guarantee is that of DP-SGD without a condition. Both factors change every round, so
    both come down; one goes up. Source: Zhu et al. 2024, "DEeR: Deviation Eliminating and Noise Regulating for
    Privacy-preserving Federated Low-rank Adaptation", arXiv 2410.12926.
    """

    summary = "as rolora, with the factor at rest orthonormal, so that noise on the other keeps its size in dW"
    equation = (
        "odd rounds: (B, A) -> (B L, Q) with A = L Q, Q Q^T = 1; B = sum_k p_k B_k; "
        "even rounds: (B, A) -> (Q, L A) with B = Q L, Q^T Q = 1; A = sum_k p_k A_k"
    )
    source = "Zhu et al. 2024, arXiv 2410.12926"
    capabilities = Capabilities(linear_sum=True, exact=True, resets_state=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        return regauged(initial, 1)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return with_factors_at_rest(state, self.round)

    def start_round(self, state: AdapterState) -> None:
        self._state = state
        self._mean = RunningMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight)

    def result(self) -> AdapterState:
        mean = AdapterState(self._state.spec, {**self._state, **self._mean.take()})
        return regauged(mean, self.round + 1).require_finite()


def regauged(state: AdapterState, number: int) -> AdapterState:
    """The same dW, with the factor orthonormal that rests in round ``number``; pairs that are not all shared stay."""
    tensors = dict(state)
    for pair in state.spec.pairs:
        if {state.spec.by_name[name].policy for name in (pair.a, pair.b)} != {"share"}:
            continue
        a, b = (state[name].astype(np.float64) for name in (pair.a, pair.b))
        if number % 2:
            q, lower = _orthonormal(a.T, pair)
            a, b = q.T, b @ lower.T
        else:
            q, upper = _orthonormal(b, pair)
            a, b = upper @ a, q
        tensors[pair.a], tensors[pair.b] = a.astype(state[pair.a].dtype), b.astype(state[pair.b].dtype)
    return AdapterState(state.spec, tensors)


def _orthonormal(tall: np.ndarray, pair: LowRankPair) -> tuple[np.ndarray, np.ndarray]:
    """Q and R of ``tall``, with signs fixed by the diagonal of R, so that they are functions of it alone."""
    if tall.shape[0] < tall.shape[1]:
        raise UserError(
            f"strategy `deer` makes factors orthonormal, which rank {tall.shape[1]} cannot be on the side of "
            f"{tall.shape[0]} of the pair {pair.a}; lower method.rank"
        )
    q, r = np.linalg.qr(tall)
    signs = np.where(np.diag(r) < 0, -1.0, 1.0)
    return q * signs, r * signs[:, None]
