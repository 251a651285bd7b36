"""Distances, lengths and steps of changes against dense matrices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.strategies.robust.distances import Path, change, gram, moved, norm, squared_distances


def test_inner_products_are_those_of_dense_changes(bench: Any) -> None:
    start, sent = bench.start(), bench.sent()
    dense = np.stack([bench.dense(state) - bench.dense(start) for state in sent])
    changes = [change(start, state) for state in sent]
    np.testing.assert_allclose(gram(changes), dense @ dense.T, rtol=1e-12)
    np.testing.assert_allclose([norm(one) for one in changes], np.linalg.norm(dense, axis=1), rtol=1e-12)
    want = [[np.sum((x - y) ** 2) for y in dense] for x in dense]
    np.testing.assert_allclose(squared_distances(gram(changes)), want, rtol=1e-10, atol=0)


def test_scaling_and_layout_are_in_the_distance(bench: Any, specs: Callable[..., AdapterSpec]) -> None:
    """The same factors under another alpha / r change the model by as much more."""
    once, twice = specs(scaling=1.0), specs(scaling=2.0)
    factors = {name for pair in once.pairs for name in (pair.a, pair.b)}

    def of(spec: AdapterSpec) -> float:
        start = bench.state(99, spec=spec)
        sent = AdapterState(spec, {**start, **{n: a for n, a in bench.state(1, spec=spec).items() if n in factors}})
        return norm(change(start, sent))

    assert of(twice) == pytest.approx(2 * of(once), rel=1e-12)
    # `v` stores its weight transposed and `q` does not; turned round, the distance stays.
    turned = tuple(LowRankPair(p.a, p.b, p.scaling, not p.fan_in_fan_out) for p in once.pairs)
    assert of(AdapterSpec("lora", once.tensors, turned, once.rank, once.alpha)) == of(once)


def test_a_distance_between_factors_is_not_one_between_models(bench: Any, gauged: Callable[..., AdapterState]) -> None:
    start = bench.start()
    here, there = bench.near(start, 1), gauged(bench.near(start, 1), 5)
    squares = squared_distances(gram([change(start, here), change(start, there)]))
    assert (here - there).norm() > 1
    # Zero but for rounding, which a square root of a difference of squares raises to half of the digits.
    assert np.sqrt(squares[0, 1]) < 1e-6 * norm(change(start, here))


def test_sites_of_different_ranks_are_compared(bench: Any, specs: Callable[..., AdapterSpec]) -> None:
    small, large = specs(rank=2, scaling=3.0), specs(rank=4, scaling=1.5)
    starts = [bench.state(98, spec=small), bench.state(99, spec=large)]
    sent = [bench.near(start, seed) for seed, start in enumerate(starts)]
    dense = [bench.dense(state) - bench.dense(start) for start, state in zip(starts, sent, strict=True)]
    got = gram([change(start, state) for start, state in zip(starts, sent, strict=True)])
    np.testing.assert_allclose(got, [[x @ y for y in dense] for x in dense], rtol=1e-12)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_with_one_factor_frozen_the_other_moves_dw(bench: Any, frozen: str) -> None:
    spec = bench.spec.with_policy("freeze", lambda tensor: tensor.role == frozen)
    start = bench.state(99, spec=spec)
    sent = [bench.near(start, seed).only(spec.select("share")) for seed in range(4)]
    assert all(frozen not in name for state in sent for name in state)
    dense = np.stack([bench.dense(state.filled_from(start)) - bench.dense(start) for state in sent])
    np.testing.assert_allclose(gram([change(start, state) for state in sent]), dense @ dense.T, rtol=1e-12)


def test_beside_a_factor_that_stays_at_the_site_the_other_counts_by_its_numbers(bench: Any) -> None:
    spec = bench.spec.with_policy("local", lambda tensor: tensor.role == "lora_B")
    start = bench.state(99, spec=spec)
    sent = [bench.near(start, seed).only(spec.select("share")) for seed in range(4)]
    flat = np.stack([np.concatenate([(state[n] - start[n]).ravel() for n in state]) for state in sent])
    np.testing.assert_allclose(gram([change(start, state) for state in sent]), flat @ flat.T, rtol=1e-12)


def test_a_small_step_from_large_factors_keeps_its_digits(bench: Any) -> None:
    """Differences of whole dW would lose as many digits as the step is smaller than the weights."""
    start = bench.start()
    sent = bench.near(start, 1, step=1e-9)
    exact = start.map(lambda array: array.astype(np.longdouble).astype(array.dtype))
    want = 0.0
    for pair in start.spec.pairs:
        b0, a0, b, a = (x.astype(np.longdouble) for x in (exact[pair.b], exact[pair.a], sent[pair.b], sent[pair.a]))
        want += float(np.sum((pair.scaling * ((b - b0) @ a + b0 @ (a - a0))) ** 2))
    want += sum(float(np.sum((sent[n] - start[n]) ** 2)) for n in ("head", "bias"))
    assert norm(change(start, sent)) == pytest.approx(np.sqrt(want), rel=1e-10)


def test_no_matrix_of_the_size_of_a_weight_is_made() -> None:
    m, n, r = 4000, 3000, 2
    pair = LowRankPair("a", "b", 1.0)
    spec = AdapterSpec("lora", (TensorSpec("a", (r, n)), TensorSpec("b", (m, r))), (pair,), rank=r, alpha=2.0)
    random = np.random.default_rng(0)
    states = [
        AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(np.float32) for t in spec.tensors})
        for _ in range(6)
    ]
    tracemalloc.start()
    gram([change(states[0], state) for state in states[1:]])
    Path.between(states[0], states[1]).reach(3.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Five changes as factors of rank 2 r in float64, twice while they are stacked; a dense float32 dW is 48 MB.
    assert peak < 3 * 5 * 2 * r * (m + n) * 8
    assert peak < m * n


def test_the_length_along_the_way_is_that_of_dense_changes(bench: Any) -> None:
    start, sent = bench.start(), bench.near(bench.start(), 1, step=2.0)
    path = Path.between(start, sent)
    for part in (0.0, 0.1, 0.5, 1.0, 3.0):
        want = np.linalg.norm(bench.dense(moved(start, sent, part)) - bench.dense(start))
        assert path.length(part) == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("length", [1e-6, 0.1, 1.0, 20.0, 1e6])
def test_a_change_is_brought_to_a_length(bench: Any, length: float) -> None:
    start = bench.start()
    for seed in range(5):
        sent = bench.near(start, seed, step=1.5)
        part = Path.between(start, sent).reach(length)
        got = np.linalg.norm(bench.dense(moved(start, sent, part)) - bench.dense(start))
        assert got == pytest.approx(length, rel=1e-9)


def test_where_the_way_turns_back_the_first_point_at_that_length_is_taken() -> None:
    """dB A_0 + B_0 dA against dB dA: the change grows to a quarter, is zero at the end, and grows again."""
    pair = LowRankPair("a", "b", 1.0)
    spec = AdapterSpec(
        "lora", (TensorSpec("a", (1, 1), dtype="float64"), TensorSpec("b", (1, 1), dtype="float64")), (pair,), 1, 1.0
    )
    one = np.ones((1, 1))
    start, sent = (AdapterState(spec, {"a": a, "b": b}) for a, b in ((one, one), (-one, -one)))
    # dW(c) = (1 - 2 c)^2, so its change is 4 c - 4 c^2: the largest at c = 1/2, where it is 1; nothing at c = 1.
    path = Path.between(start, sent)
    assert path.length(0.5) == pytest.approx(1.0) and path.length(1.0) == pytest.approx(0.0, abs=1e-12)
    assert path.reach(0.75) == pytest.approx(0.25)
    assert path.reach(1.0) == pytest.approx(0.5, abs=1e-6)
    assert path.reach(3.0) == pytest.approx(1.5)


def test_what_does_not_move_reaches_no_length(bench: Any) -> None:
    start = bench.start()
    assert Path.between(start, start).reach(1.0) == float("inf")
    assert norm(change(start, start)) == 0
