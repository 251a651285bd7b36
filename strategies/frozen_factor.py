"""Strategies that freeze one low-rank factor, so that averaging the other is exact."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..core.adapter import AdapterState
from ..core.errors import UserError
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT


class FrozenFactorOptions(Options):
    """``basis``: ``orthonormal`` rows for A, ``random`` as the method drew it, or ``svd``, singular vectors of W0."""

    basis: Literal["orthonormal", "random", "svd"] = "orthonormal"


@strategy("ffa")
class FFA(FedIT):
    """FFA-LoRA: A is frozen and equal everywhere, B is averaged, so mean(B_k) A = mean(B_k A) exactly.

    Under DP the noise on A, and the product of noises, fall away. Rows of A are made orthogonal and keep their root
    mean square length, so that the scale of dW for a given B does not depend on the draw; B of an adapter that was
    trained before takes up the difference, and dW stays. With ``basis = "svd"`` A is where ``method.init = "svd"`` put
    it, at the right singular vectors of W0 with the largest singular values: the base weights are where the model is,
    not here. Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.
    """

    summary = "A frozen (orthonormal), B = sum p_k B_k"
    equation = "B = sum_k p_k B_k; A as at the start"
    source = "Sun et al. 2024, arXiv 2403.12313"
    capabilities = Capabilities(linear_sum=True, exact=True)
    Options = FrozenFactorOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        factors = [pair.a for pair in initial.spec.pairs]
        if not factors:
            raise UserError(
                f"strategy `ffa` freezes the factor A of a low-rank method; {initial.spec.method} has none: choose lora"
            )
        if self.options.basis == "svd" and initial.spec.options.get("init") != "svd":
            raise UserError("strategy `ffa` with basis svd takes A from the base weights: set method.init=svd")
        frozen = set(factors)
        spec = initial.spec.with_policy("freeze", lambda tensor: tensor.name in frozen)
        tensors = dict(initial)
        if self.options.basis == "orthonormal":
            for pair in initial.spec.pairs:
                a, b = initial[pair.a], initial[pair.b]
                tensors[pair.a] = orthonormal_rows(a)
                if b.any():
                    tensors[pair.b] = _in_place_of(b, a, tensors[pair.a])
        return AdapterState(spec, tensors)


def orthonormal_rows(a: np.ndarray) -> np.ndarray:
    """A matrix (r, n) of orthogonal rows that span those of ``a``, each of their root mean square length.

    Signs are fixed by the diagonal of R, so the result is a function of ``a`` alone. Needs r <= n.
    """
    if a.shape[0] > a.shape[1]:
        raise UserError(f"a factor of shape {list(a.shape)} has more rows than columns; lower method.rank")
    q, r = np.linalg.qr(a.astype(np.float64).T)
    length = np.sqrt(np.mean(np.sum(a.astype(np.float64) ** 2, axis=1)))
    return ((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T * length).astype(a.dtype)


def _in_place_of(b: np.ndarray, a: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """B' with B' basis = ``b a``, for a ``basis`` of orthogonal rows of one length that span those of ``a``."""
    wide = basis.astype(np.float64)
    across = a.astype(np.float64) @ wide.T / np.mean(np.sum(wide**2, axis=1))
    return (b.astype(np.float64) @ across).astype(b.dtype)
