from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.strategies.merging import Adapter, Context, create_merger
from fedgraft.strategies.merging.lorahub import by_factors, by_products, search

M, N = 7, 9
A, B, HEAD = "x.lora_A.default.weight", "x.lora_B.default.weight", "head.weight"


def spec(rank: int = 2, alpha: float = 8.0, **options: Any) -> AdapterSpec:
    tensors = (
        TensorSpec(A, (rank, N), "float64", "lora_A", "product"),
        TensorSpec(B, (M, rank), "float64", "lora_B", "product"),
        TensorSpec(HEAD, (3, 4), "float64", "head"),
    )
    return AdapterSpec("lora", tensors, (LowRankPair(A, B, alpha / rank, **options),), rank, alpha)


def adapter(seed: int, rank: int = 2, alpha: float = 8.0, **options: Any) -> Adapter:
    draw = np.random.default_rng(seed)
    own = spec(rank, alpha, **options)
    return Adapter(f"s{seed}", AdapterState(own, {t.name: draw.standard_normal(t.shape) for t in own.tensors}))


def merged_by(adapters: list[Adapter], loss: Any, *, rank: int = 2, seed: int = 0, **options: Any) -> Any:
    context = Context(spec=spec(rank), loss=loss, labels=6, seed=seed)
    return create_merger("lorahub", options).merge(adapters, context)


def pair_of(state: AdapterState) -> LowRankPair:
    return state.spec.pairs[0]


def delta(state: AdapterState) -> np.ndarray:
    return state.delta(pair_of(state))


WEIGHTS = np.array([0.7, -0.4, 1.2])


@pytest.mark.parametrize("flipped", [False, True])
def test_factors_are_summed_apart_as_the_paper_says(flipped: bool) -> None:
    adapters = [adapter(seed, fan_in_fan_out=flipped) for seed in range(3)]
    context = Context(spec=spec(fan_in_fan_out=flipped))
    state, lost = by_factors(adapters, context)(WEIGHTS)
    b = sum(w * x.state[B] for w, x in zip(WEIGHTS, adapters, strict=True))
    a = sum(w * x.state[A] for w, x in zip(WEIGHTS, adapters, strict=True))
    np.testing.assert_allclose(delta(state), 4.0 * b @ a, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state[HEAD], sum(w * x.state[HEAD] for w, x in zip(WEIGHTS, adapters, strict=True)))
    assert lost == 0.0


def test_peers_that_scale_otherwise_add_up_as_if_they_scaled_alike() -> None:
    first, second = adapter(0), adapter(1, alpha=32.0)
    same = replace(second, state=AdapterState(spec(), {**second.state, B: 4 * second.state[B]}))
    context = Context(spec=spec())
    weights = np.array([0.5, 0.8])
    got, _ = by_factors([first, second], context)(weights)
    want, _ = by_factors([first, same], context)(weights)
    np.testing.assert_allclose(delta(got), delta(want), rtol=1e-12)


def test_factors_of_a_smaller_rank_are_filled_up_with_zeros() -> None:
    large, small = adapter(0, 3), adapter(1, 1)
    state, _ = by_factors([large, small], Context(spec=spec(3)))(np.array([0.5, 2.0]))
    # s B A with s = 8 / rank: the small one's scaling is 8, the result's 8 / 3.
    b = 0.5 * (8 / 3) * large.state[B]
    b[:, :1] += 2.0 * 8 * small.state[B]
    a = 0.5 * large.state[A]
    a[:1] += 2.0 * small.state[A]
    np.testing.assert_allclose(delta(state), b @ a, rtol=1e-12, atol=1e-12)


def test_products_are_summed_exactly_where_the_rank_allows() -> None:
    adapters = [adapter(0, 2), adapter(1, 3), adapter(2, 1, alpha=5.0)]
    state, lost = by_products(adapters, Context(spec=spec(6)))(WEIGHTS)
    want = sum(w * delta(x.state) for w, x in zip(WEIGHTS, adapters, strict=True))
    np.testing.assert_allclose(delta(state), want, rtol=1e-12, atol=1e-12)
    assert lost == 0.0


def test_products_beyond_the_rank_become_the_nearest_ones_of_that_rank() -> None:
    adapters = [adapter(seed) for seed in range(3)]
    state, lost = by_products(adapters, Context(spec=spec(2)))(WEIGHTS)
    dense = sum(w * delta(x.state) for w, x in zip(WEIGHTS, adapters, strict=True))
    u, s, vt = np.linalg.svd(dense)
    np.testing.assert_allclose(delta(state), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)
    assert lost == pytest.approx(np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2)), rel=1e-9)


def test_the_changes_since_a_common_start_are_weighed() -> None:
    start = adapter(9).state
    adapters = [adapter(seed) for seed in range(3)]
    state, _ = by_products(adapters, Context(spec=spec(8), start=start))(WEIGHTS)
    dense = delta(start) + sum(w * (delta(x.state) - delta(start)) for w, x in zip(WEIGHTS, adapters, strict=True))
    np.testing.assert_allclose(delta(state), dense, atol=1e-11)
    head = start[HEAD] + sum(w * (x.state[HEAD] - start[HEAD]) for w, x in zip(WEIGHTS, adapters, strict=True))
    np.testing.assert_allclose(state[HEAD], head, atol=1e-12)
    with pytest.raises(UserError, match="compose = products"):
        by_factors(adapters, Context(spec=spec(), start=start))


def test_the_search_finds_the_minimum_of_a_bowl() -> None:
    target = np.array([0.5, -0.3, 1.0])
    found = search(lambda w: float(np.sum((w - target) ** 2)), 3, penalty=0.0)
    assert found.objective < 0.02
    np.testing.assert_allclose(found.weights, target, atol=0.15)
    assert len(found.tried) == 40


def test_the_penalty_is_the_mean_of_the_sizes_times_five_hundredths() -> None:
    found = search(lambda w: 0.0 if np.any(w) else 1.0, 4, steps=6)
    assert found.start == 1.0
    assert found.objective == pytest.approx(0.05 * np.abs(found.weights).sum() / 4, rel=1e-12)


def test_weights_stay_within_the_bound() -> None:
    tried: list[np.ndarray] = []

    def loss(weights: np.ndarray) -> float:
        tried.append(weights.copy())
        return -float(weights.sum())

    found = search(loss, 4, penalty=0.0)
    assert max(float(np.abs(w).max()) for w in tried) <= 1.5
    assert found.weights.sum() > 3.0


def test_what_is_found_is_never_worse_than_no_adapter_at_all() -> None:
    found = search(lambda w: float(np.sum(np.abs(w))), 3)
    assert found.objective == found.start == 0.0
    assert not found.weights.any()


def test_a_loss_that_is_no_number_is_the_worst_and_harms_nothing() -> None:
    found = search(lambda w: float("nan") if w[0] > 0 else float((w[1] - 0.4) ** 2), 2, penalty=0.0)
    assert found.weights[0] <= 0
    assert found.objective < 0.05


def test_the_same_seed_finds_the_same_weights() -> None:
    def loss(weights: np.ndarray) -> float:
        return float(np.sum((weights - 0.3) ** 2) + 0.1 * np.sin(7 * weights).sum())

    first, again = (search(loss, 5, seed=4, optimiser="DE") for _ in range(2))
    other = search(loss, 5, seed=5, optimiser="DE")
    assert first.tried == again.tried
    assert first.tried != other.tried


@pytest.mark.parametrize("compose", ["factors", "products"])
def test_the_merger_finds_the_adapter_that_fits_the_records(compose: str) -> None:
    adapters = [adapter(seed) for seed in range(3)]
    wanted = delta(adapters[1].state)

    def loss(state: AdapterState) -> float:
        return float(np.sum((delta(state) - wanted) ** 2) / np.sum(wanted**2))

    merged = merged_by(adapters, loss, rank=6 if compose == "products" else 2, compose=compose, penalty=0.01)
    assert loss(merged.state) < 0.3
    assert max(merged.weights, key=lambda name: abs(merged.weights[name])) == "s1"
    assert "6 labelled records" in merged.reasons["s1"]
    assert any("unless these are public" in note for note in merged.notes)


def test_of_many_adapters_only_some_are_drawn() -> None:
    adapters = [adapter(seed) for seed in range(5)]
    merged = merged_by(adapters, lambda state: float(np.sum(state[HEAD] ** 2)) - 1, most=2, steps=3)
    left = [name for name, reason in merged.reasons.items() if "not among the 2 of 5" in reason]
    assert len(left) == 3
    assert all(merged.weights[name] == 0.0 for name in left)


def test_one_adapter_comes_back_as_itself() -> None:
    only = adapter(3)
    merged = merged_by([only], None)
    np.testing.assert_allclose(delta(merged.state), delta(only.state), rtol=1e-12)
    assert merged.weights == {"s3": 1.0}


def test_a_kept_head_is_the_first_adapters() -> None:
    adapters = [adapter(seed) for seed in range(2)]
    state, _ = by_factors(adapters, Context(spec=spec(), heads="first"))(np.array([0.2, 0.9]))
    np.testing.assert_array_equal(state[HEAD], adapters[0].state[HEAD])


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (lambda: [adapter(0), adapter(1)], {"optimiser": "Nothing"}, "nevergrad has no `Nothing`"),
        (lambda: [adapter(0), adapter(1, 3)], {}, "adapter s1 has rank 3"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(make: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        merged_by(make(), lambda state: 0.0, **options)


def test_without_records_there_is_no_search() -> None:
    with pytest.raises(UserError, match="few labelled records; give them"):
        merged_by([adapter(0), adapter(1)], None)


def test_a_tensor_beside_factors_and_heads_is_refused() -> None:
    held = adapter(0).state
    bias = TensorSpec("x.bias", (3,), "float64", "bias", "linear")
    odd = replace(held.spec, tensors=(*held.spec.tensors, bias))
    state = AdapterState(odd, {**held, "x.bias": np.ones(3)})
    context = Context(spec=odd, loss=lambda state: 0.0)
    with pytest.raises(UserError, match=r"tensor x\.bias"):
        create_merger("lorahub").merge([Adapter("a", state), Adapter("b", state)], context)


def test_a_missing_nevergrad_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "nevergrad":
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'fedgraft\[merge\]'"):
        search(lambda w: 0.0, 2)
