"""Arithmetic on factors against the same on dense matrices."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.strategies.lowrank import completed, effective, inner, norm, stacked, svd


def _factors(seed: int, m: int, n: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((m, r)), random.standard_normal((r, n))


@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (9, 7, 3), (7, 9, 3), (5, 30, 12), (30, 5, 12), (6, 6, 6)])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_the_singular_triples_are_those_of_the_dense_product(m: int, n: int, r: int, rank: int | None) -> None:
    b, a = _factors(m + n, m, n, r)
    u, s, vt = svd(b, a, rank)
    want_u, want_s, want_vt = np.linalg.svd(b @ a, full_matrices=False)
    k = min(r, m, n) if rank is None else min(rank, r, m, n)
    assert u.shape == (m, k) and s.shape == (k,) and vt.shape == (k, n)
    np.testing.assert_allclose(s, want_s[:k], rtol=1e-10, atol=1e-12)
    best = (want_u[:, :k] * want_s[:k]) @ want_vt[:k]
    np.testing.assert_allclose((u * s) @ vt, best, atol=1e-10 * want_s[0])
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(k), atol=1e-12)


def test_a_batch_of_products_gives_each_its_own_triples() -> None:
    pairs = [_factors(seed, 8, 6, 3) for seed in range(4)]
    u, s, vt = svd(np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs]), 2)
    for number, (b, a) in enumerate(pairs):
        for got, want in zip((u[number], s[number], vt[number]), svd(b, a, 2), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_signs_are_those_of_the_product_whatever_its_factors() -> None:
    b, a = _factors(3, 12, 9, 4)
    turn = np.random.default_rng(5).standard_normal((4, 4))
    for got, want in zip(svd(b @ turn, np.linalg.solve(turn, a)), svd(b, a), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-9)
    vt = svd(b, a)[2]
    assert (vt[np.arange(4), np.abs(vt).argmax(axis=1)] > 0).all()


def test_a_product_of_zero_has_orthonormal_vectors_in_the_space_of_its_rows() -> None:
    _, a = _factors(1, 8, 10, 3)
    u, s, vt = svd(np.zeros((8, 3)), a)
    assert not s.any()
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(a @ vt.T @ vt, a, atol=1e-12)


def test_inner_products_are_those_of_the_dense_matrices() -> None:
    held = [_factors(seed, 11, 8, r) for seed, r in enumerate((1, 3, 9, 4))]
    dense = [(b @ a).ravel() for b, a in held]
    want = np.array([[x @ y for y in dense] for x in dense])
    got = np.array([[inner(x, y) for y in held] for x in held])
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)
    assert inner(held[0], held[2]) == pytest.approx(want[0, 2], rel=1e-11)
    assert norm(held[1]) == pytest.approx(np.linalg.norm(dense[1]), rel=1e-12)


def test_the_sum_of_products_is_one_product_of_the_stack() -> None:
    held = [(w, *_factors(seed, 6, 7, r)) for seed, (w, r) in enumerate(((0.25, 2), (-1.5, 3), (2.0, 1)))]
    b, a = stacked(held)
    assert b.shape == (6, 6) and a.shape == (6, 7)
    np.testing.assert_allclose(b @ a, sum(w * left @ right for w, left, right in held), atol=1e-12)


def test_a_weight_does_not_round_float32_factors() -> None:
    b, a = (x.astype(np.float32) for x in _factors(0, 5, 5, 2))
    left, _ = stacked([(1 / 3, b, a)])
    assert left.dtype == np.float64
    np.testing.assert_allclose(left, b.astype(np.float64) / 3, rtol=1e-15)


PAIR = LowRankPair("a", "b", 1.5)
SPEC = AdapterSpec(
    "lora",
    (TensorSpec("a", (3, 9)), TensorSpec("b", (7, 3)), TensorSpec("head", (4, 2)), TensorSpec("bias", (5,))),
    pairs=(PAIR,),
    rank=3,
)


def _state(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


def test_the_effective_factors_hold_the_scaling_and_the_change_of_the_base_weights() -> None:
    state = _state(0, SPEC.with_offset({"a": 4}))
    b, a = effective(state, PAIR)
    assert b.shape == (7, 7)
    np.testing.assert_allclose(b @ a, state.delta(PAIR), atol=1e-12)


@pytest.mark.parametrize(("have", "rank", "n"), [(2, 5, 9), (3, 3, 9), (0, 2, 4), (2, 6, 4)])
def test_rows_are_completed_by_orthonormal_ones_as_far_as_there_is_room(have: int, rank: int, n: int) -> None:
    random = np.random.default_rng(rank)
    vt = np.linalg.qr(random.standard_normal((n, n)))[0][:have]
    got = completed(vt, random.standard_normal((rank, n)), rank)
    assert got.shape == (rank, n) and np.array_equal(got[:have], vt)
    full = min(rank, n)
    np.testing.assert_allclose(got[:full] @ got[:full].T, np.eye(full), atol=1e-12)
    assert not got[full:].any()


def test_no_matrix_of_the_full_size_is_made() -> None:
    m = n = 2000
    held = [_factors(seed, m, n, 4) for seed in range(3)]
    tracemalloc.start()
    svd(*stacked((1.0, b, a) for b, a in held), 4)
    inner(held[0], held[1])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < m * n * 8 / 10
