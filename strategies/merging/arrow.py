"""Arrow: each layer routes each token to the adapters whose dW responds to it most. The rule in plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ..lowrank import effective, svd


def prototypes(state: AdapterState) -> Mapping[str, np.ndarray]:
    """For each low-rank pair, by its ``a``: the direction of inputs that s B A stretches most.

    v = argmax |B A v| over |v| = 1, the first right singular vector, up to its sign; by QR and the SVD of the small
    core. Source: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv
    2405.11157, section 3.2. What a DP adapter gives is post-processing of it.
    """
    if not state.spec.pairs:
        raise UserError(f"arrow routes between low-rank adapters; method {state.spec.method} has none: use lora")
    return {pair.a: svd(*effective(state, pair), 1)[2][0] for pair in state.spec.pairs}


def coefficients(x: np.ndarray, directions: np.ndarray, most: int, temperature: float = 1.0) -> np.ndarray:
    """How much of each adapter goes into each token: softmax of |v_i . x| / temperature over the ``most`` largest.

    ``x`` (tokens, n); ``directions`` (adapters, n); the result (tokens, adapters), rows summing to 1. A sign of v_i
    means nothing, so it changes nothing.
    """
    scores = np.abs(x @ directions.T)
    kept = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    exponents = np.full(scores.shape, -np.inf)
    np.put_along_axis(exponents, kept, np.take_along_axis(scores, kept, axis=1) / temperature, axis=1)
    exponents = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def routed(x: np.ndarray, states: Sequence[AdapterState], a: str, most: int, temperature: float = 1.0) -> np.ndarray:
    """What the pair called ``a`` adds to its layer's output for inputs ``x`` (tokens, n): sum_i c_i s_i B_i A_i x."""
    directions = np.stack([prototypes(state)[a] for state in states])
    shares = coefficients(x, directions, most, temperature)
    total = 0.0
    for index, state in enumerate(states):
        pair = next(pair for pair in state.spec.pairs if pair.a == a)
        b, right = effective(state, pair)
        total = total + shares[:, index : index + 1] * (x @ right.T @ b.T)
    return np.asarray(total)
