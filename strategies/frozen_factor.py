"""Strategies that freeze one low-rank factor, so that averaging the other is exact."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..core.adapter import AdapterState
from ..core.errors import UserError
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT


class FrozenFactorOptions(Options):
    """``basis``: ``orthonormal`` rows for A, or ``random`` as the method drew it."""

    basis: Literal["orthonormal", "random"] = "orthonormal"


@strategy("ffa")
class FFA(FedIT):
    """FFA-LoRA: A is frozen and equal everywhere, B is averaged, so mean(B_k) A = mean(B_k A) exactly.

    Under DP the noise on A, and the product of noises, fall away. Rows of A are made orthogonal and keep their root
    mean square length, so that the scale of dW for a given B does not depend on the draw. Source: Sun et al. 2024,
    "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.
    """

    summary = "A frozen (orthonormal), B = sum p_k B_k"
    source = "Sun et al. 2024, arXiv 2403.12313"
    capabilities = Capabilities(linear_sum=True, exact=True)
    Options = FrozenFactorOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        factors = [pair.a for pair in initial.spec.pairs]
        if not factors:
            raise UserError(
                f"strategy `ffa` freezes the factor A of a low-rank method; {initial.spec.method} has none: choose lora"
            )
        frozen = set(factors)
        spec = initial.spec.with_policy("freeze", lambda tensor: tensor.name in frozen)
        tensors = dict(initial)
        if self.options.basis == "orthonormal":
            tensors |= {name: orthonormal_rows(initial[name]) for name in factors}
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
