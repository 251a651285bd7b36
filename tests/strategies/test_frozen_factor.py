"""FFA: A is frozen, orthogonal and as long as drawn; the mean of B is then the mean of the updates, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.frozen_factor import orthonormal_rows

PAIRS = (LowRankPair("q.a", "q.b", 2.0), LowRankPair("v.a", "v.b", 0.5, fan_in_fan_out=True))
SPEC = AdapterSpec(
    method="lora",
    tensors=(
        TensorSpec("q.a", (4, 9), role="lora_A", averaging="product"),
        TensorSpec("q.b", (6, 4), role="lora_B", averaging="product"),
        TensorSpec("v.a", (4, 4), role="lora_A", averaging="product"),
        TensorSpec("v.b", (3, 4), role="lora_B", averaging="product"),
        TensorSpec("head", (3,), role="head"),
    ),
    pairs=PAIRS,
)


def _state(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (4, 9), (6, 6), (16, 300)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_become_orthogonal_keep_their_length_and_their_span(shape: tuple[int, int], dtype: str) -> None:
    a = (3.7 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    got = orthonormal_rows(a)
    assert got.shape == a.shape and got.dtype == a.dtype
    eps = 1e-5 if dtype == "float32" else 1e-12
    wide, given = got.astype(np.float64), a.astype(np.float64)
    square = float(np.mean(np.sum(given**2, axis=1)))
    assert np.abs(wide @ wide.T - square * np.eye(shape[0])).max() <= eps * square
    # Same span: projecting the given rows onto the new ones loses nothing.
    assert np.abs(given - given @ wide.T @ wide / square).max() <= eps * np.abs(given).max()
    # The whole factor keeps its Frobenius norm, so dW keeps its scale.
    assert np.linalg.norm(wide) == pytest.approx(np.linalg.norm(given), rel=eps)


def test_orthogonal_rows_stay_as_they_are() -> None:
    a = np.linalg.qr(np.random.default_rng(1).standard_normal((9, 4)))[0].T * 2.5
    np.testing.assert_allclose(orthonormal_rows(a), a, atol=1e-12)


def test_the_first_row_keeps_its_direction_and_sign() -> None:
    """Gram and Schmidt, without the free signs of a QR routine: every machine gets the same factor."""
    for seed in range(20):
        a = np.random.default_rng(seed).standard_normal((3, 5))
        got = orthonormal_rows(a)
        naive: list[np.ndarray] = []
        for row in a:
            for other in naive:
                row = row - (row @ other) * other
            naive.append(row / np.linalg.norm(row))
        length = np.sqrt(np.mean(np.sum(a**2, axis=1)))
        np.testing.assert_allclose(got, length * np.stack(naive), atol=1e-12)


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \[5, 4\] has more rows than columns; lower method\.rank"):
        orthonormal_rows(np.ones((5, 4)))


def _fresh(seed: int) -> AdapterState:
    """As LoRA begins: B is zero."""
    state = _state(seed)
    return AdapterState(SPEC, {**state, **{pair.b: np.zeros_like(state[pair.b]) for pair in PAIRS}})


def test_prepare_freezes_every_a_and_nothing_else() -> None:
    initial = _fresh(0)
    prepared = create_aggregator("ffa").prepare(initial)
    assert prepared.spec.select("freeze") == ("q.a", "v.a")
    assert prepared.spec.select("share") == ("q.b", "v.b", "head")
    assert prepared.spec.select("local") == ()
    assert prepared.spec.pairs == PAIRS
    for name in ("q.b", "v.b", "head"):
        assert np.array_equal(prepared[name], initial[name])
    for name in ("q.a", "v.a"):
        assert np.array_equal(prepared[name], orthonormal_rows(initial[name]))
        assert not np.array_equal(prepared[name], initial[name])


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_an_adapter_that_was_trained_before_keeps_its_dw_when_its_a_becomes_orthogonal(scale: float) -> None:
    initial = _state(0) * scale
    prepared = create_aggregator("ffa").prepare(initial)
    for pair in PAIRS:
        assert not np.allclose(prepared[pair.a], initial[pair.a], rtol=0.1)
        want = initial.delta(pair)
        assert np.abs(prepared.delta(pair) - want).max() <= 1e-6 * np.abs(want).max()
        a = prepared[pair.a].astype(np.float64)
        np.testing.assert_allclose(a @ a.T, (a @ a.T)[0, 0] * np.eye(4), atol=1e-5 * scale**2)


def test_a_basis_of_singular_vectors_is_left_where_the_method_put_it() -> None:
    spec = replace(SPEC, options={"init": "svd"})
    initial = _state(0, spec)
    prepared = create_aggregator("ffa", {"basis": "svd"}).prepare(initial)
    assert prepared.spec.select("freeze") == ("q.a", "v.a")
    assert all(np.array_equal(prepared[name], initial[name]) for name in initial)


@pytest.mark.parametrize("options", [{}, {"init": "orthonormal"}])
def test_a_basis_of_singular_vectors_needs_the_method_that_has_the_base_weights(options: dict[str, str]) -> None:
    initial = _state(0, replace(SPEC, options=options))
    with pytest.raises(UserError) as refusal:
        create_aggregator("ffa", {"basis": "svd"}).prepare(initial)
    assert str(refusal.value) == "strategy `ffa` with basis svd takes A from the base weights: set method.init=svd"


def test_an_svd_basis_of_a_model_is_orthonormal_and_exact(lab: Any) -> None:
    state = lab.attach("gpt2", "sequence-classification", "lora", init="svd").read()
    prepared = create_aggregator("ffa", {"basis": "svd"}).prepare(state)
    for pair in prepared.spec.pairs:
        a = prepared[pair.a].astype(np.float64)
        np.testing.assert_allclose(a @ a.T, (a @ a.T)[0, 0] * np.eye(4), atol=1e-5)


def test_a_random_basis_is_left_as_drawn() -> None:
    initial = _state(0)
    prepared = create_aggregator("ffa", {"basis": "random"}).prepare(initial)
    assert prepared.spec.select("freeze") == ("q.a", "v.a")
    assert all(np.array_equal(prepared[name], initial[name]) for name in initial)


@pytest.mark.parametrize("basis", ["orthonormal", "random"])
def test_the_mean_of_b_is_the_mean_of_the_updates(basis: str) -> None:
    rule = create_aggregator("ffa", {"basis": basis})
    start = rule.prepare(_state(0))
    shared = start.spec.select("share")
    weights = (1.0, 5.0, 0.25)
    # Each site trains everything but A.
    trained = [
        AdapterState(start.spec, {**_state(seed), "q.a": start["q.a"], "v.a": start["v.a"]}) for seed in (1, 2, 3)
    ]
    rule.start_round(start)
    for index, (state, weight) in enumerate(zip(trained, weights, strict=True)):
        rule.add(Update(f"site-{index}", state.only(shared), weight))
    result = rule.result()
    assert tuple(result) == shared
    after = result.filled_from(start)
    for pair in PAIRS:
        true = sum(w * state.delta(pair) for w, state in zip(weights, trained, strict=True)) / sum(weights)
        assert np.abs(after.delta(pair) - true).max() <= 1e-6 * np.abs(true).max()
    assert rule.capabilities.exact and rule.capabilities.linear_sum


def test_without_freezing_the_same_mean_would_be_wrong() -> None:
    """The test above can fail: average A as well, and dW is not the mean."""
    states = [_state(seed) for seed in (1, 2)]
    mean = (states[0] + states[1]) * 0.5
    for pair in PAIRS:
        true = (states[0].delta(pair) + states[1].delta(pair)) / 2
        assert np.abs(mean.delta(pair) - true).max() > 0.1 * np.abs(true).max()


@pytest.mark.parametrize("method", ["bitfit", "ia3", "ln", "prefix"])
def test_a_method_without_factors_is_refused(method: str) -> None:
    state = _state(0, AdapterSpec(method=method, tensors=(TensorSpec("x", (3,)),)))
    with pytest.raises(UserError) as refusal:
        create_aggregator("ffa").prepare(state)
    assert (
        str(refusal.value)
        == f"strategy `ffa` freezes the factor A of a low-rank method; {method} has none: choose lora"
    )
