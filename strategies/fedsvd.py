"""FedSVD: A is frozen within a round, and new after it: the right singular vectors of what was learned."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean
from .lowrank import completed, svd
from .refactoring import require_factors


class FedSVDOptions(Options):
    """``every``: rounds between two new factorisations."""

    every: int = Field(1, ge=1)


@strategy("fedsvd")
class FedSVD(Aggregator):
    """B = sum p_k B_k with A frozen; then U S V^T = SVD(B A), and A = V^T, B = U S, which leaves dW as it is.

    Exact, and a sum: A is equal at all sites, and the factorisation is made of the mean. Rows of A are orthonormal, so
    that noise on B reaches dW undistorted. But orthonormal rows that span the same space differ by a rotation only, and
    so do the B that belong to them: A never leaves the row space it starts with. Steps of SGD, clipped gradients and
    Gaussian noise turn with the rotation, so that under them every round's dW is that of FFA with orthonormal A; an
    optimiser that weighs coordinates, such as Adam, is what makes the two differ.

    Source: Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv
    2505.12805.
    """

    summary = "A frozen, B = sum p_k B_k, then SVD(B A): A = V^T, B = U S"
    equation = "B = sum_k p_k B_k; U S V^T = SVD(B A); A = V^T, B = U S"
    source = "Lee et al. 2025, arXiv 2505.12805"
    capabilities = Capabilities(linear_sum=True, exact=True, resets_state=True)
    Options = FedSVDOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        frozen = {pair.a for pair in initial.spec.pairs}
        spec = initial.spec.with_policy("freeze", lambda tensor: tensor.name in frozen)
        return _orthonormal(initial.with_spec(spec))

    def start_round(self, state: AdapterState) -> None:
        self._state = state
        self._mean = RunningMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight)

    def result(self) -> AdapterState:
        mean = self._mean.take().filled_from(self._state).with_spec(self._state.spec)
        return _orthonormal(mean) if self.round % self.options.every == 0 else mean


def _orthonormal(state: AdapterState) -> AdapterState:
    """The same dW with A = V^T and B = U S; a B of zero leaves A orthonormal in the space of its rows."""
    tensors = dict(state)
    for pair in state.spec.pairs:
        a, b = state[pair.a], state[pair.b]
        if len(a) > a.shape[1]:
            continue  # more rows than columns: they cannot be orthonormal
        u, s, vt = svd(b, a)
        whole = np.zeros(b.shape)
        whole[:, : len(s)] = u * s
        tensors[pair.a], tensors[pair.b] = completed(vt, a, len(a)).astype(a.dtype), whole.astype(b.dtype)
    return AdapterState(state.spec, tensors).require_finite()
