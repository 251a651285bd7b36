from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.strategies.merging.arrow import coefficients, prototypes, routed

A, B = "x.lora_A.default.weight", "x.lora_B.default.weight"


def state(seed: int, rank: int = 3, scaling: float = 2.0) -> AdapterState:
    tensors = (
        TensorSpec(A, (rank, 9), "float64", "lora_A", "product"),
        TensorSpec(B, (7, rank), "float64", "lora_B", "product"),
    )
    spec = AdapterSpec("lora", tensors, (LowRankPair(A, B, scaling),), rank, scaling * rank)
    draw = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: draw.standard_normal(t.shape) for t in spec.tensors})


def test_a_prototype_is_the_first_right_singular_vector_of_the_dense_update() -> None:
    for seed in range(4):
        held = state(seed)
        want = np.linalg.svd(held.delta(held.spec.pairs[0]))[2][0]
        assert abs(float(prototypes(held)[A] @ want)) == pytest.approx(1.0, abs=1e-12)


def test_coefficients_are_a_softmax_over_the_largest_responses() -> None:
    draw = np.random.default_rng(1)
    x, directions = draw.standard_normal((6, 9)), draw.standard_normal((4, 9))
    got = coefficients(x, directions, 2, 0.7)
    for row, token in zip(got, x, strict=True):
        responses = [abs(float(token @ v)) for v in directions]
        kept = sorted(range(4), key=lambda i: -responses[i])[:2]
        total = sum(np.exp(responses[i] / 0.7) for i in kept)
        want = [np.exp(responses[i] / 0.7) / total if i in kept else 0.0 for i in range(4)]
        np.testing.assert_allclose(row, want, rtol=1e-12)


def test_the_sign_of_a_prototype_means_nothing() -> None:
    draw = np.random.default_rng(2)
    x, directions = draw.standard_normal((6, 9)), draw.standard_normal((4, 9))
    flipped = directions * np.array([1, -1, -1, 1])[:, None]
    np.testing.assert_array_equal(coefficients(x, directions, 3), coefficients(x, flipped, 3))


def test_routing_adds_the_weighted_updates_of_each_token() -> None:
    states = [state(0), state(1, rank=2, scaling=0.5), state(2)]
    x = np.random.default_rng(3).standard_normal((5, 9))
    got = routed(x, states, A, 2)
    directions = np.stack([np.linalg.svd(s.delta(s.spec.pairs[0]))[2][0] for s in states])
    shares = coefficients(x, directions, 2)
    for row, token, share in zip(got, x, shares, strict=True):
        want = sum(c * s.delta(s.spec.pairs[0]) @ token for c, s in zip(share, states, strict=True))
        np.testing.assert_allclose(row, want, rtol=1e-10, atol=1e-12)


def test_an_adapter_without_factors_cannot_be_routed_to() -> None:
    spec = replace(state(0).spec, tensors=(TensorSpec("bias", (3,), "float64"),), pairs=(), method="bitfit")
    with pytest.raises(UserError, match="method bitfit has none"):
        prototypes(AdapterState(spec, {"bias": np.zeros(3)}))
