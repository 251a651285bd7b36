"""FLoRA against dense means in float64: several rounds, mixed ranks, both layouts, any scaling, absent sites."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec, offset_a, offset_b
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.stacking import FLoRA, StackedSum

SHAPES = ((14, 9), (8, 17))
RANKS = {"east": 4, "north": 2, "south": 1}
WEIGHTS = {"east": 3.0, "north": 10.0, "south": 0.5}
#: Offsets are kept in float32, and rounded once a round.
TOLERANCE = 1e-6


def _spec(rank: int = 4, alpha: float = 5.0, *, root: bool = False, flipped: bool = False) -> AdapterSpec:
    tensors, pairs = [], []
    for index, (m, n) in enumerate(SHAPES):
        tensors += [TensorSpec(f"{index}.a", (rank, n), role="lora_A"), TensorSpec(f"{index}.b", (m, rank))]
        pairs.append(LowRankPair(f"{index}.a", f"{index}.b", alpha / (rank**0.5 if root else rank), flipped))
    tensors += [TensorSpec("bias", (5,)), TensorSpec("frozen", (2,), policy="freeze")]
    return AdapterSpec(
        "lora", tuple(tensors), tuple(pairs), rank=rank, alpha=alpha, options={"scaling": "sqrt"} if root else {}
    )


def _drawn(spec: AdapterSpec, seed: int, zero: Sequence[str] = ()) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(
        spec,
        {t.name: (random.standard_normal(t.shape) * (t.name not in zero)).astype(t.dtype) for t in spec.tensors},
    )


def _fresh(spec: AdapterSpec) -> AdapterState:
    return _drawn(spec, 0, zero=[pair.b for pair in spec.pairs])


def _rule(ranks: Mapping[str, int] = RANKS, **options: Any) -> FLoRA:
    rule = create_aggregator("flora", options)
    assert isinstance(rule, FLoRA)
    rule.ranks = ranks
    return rule


def _trained(rule: FLoRA, state: AdapterState, site: str, seed: int) -> AdapterState:
    """The whole adapter of ``site``: what it received, with other values for all that it shares."""
    received = rule.for_site(state, site)
    other = _drawn(received.spec, seed)
    return AdapterState(received.spec, {**received, **{n: other[n] for n in received.spec.select("share")}})


def _round(
    rule: FLoRA, state: AdapterState, number: int, sites: Sequence[str] = tuple(WEIGHTS)
) -> tuple[AdapterState, dict[str, AdapterState]]:
    """The next global adapter, and the whole adapters of the sites that it is made of."""
    rule.round = number
    rule.start_round(state)
    trained = {site: _trained(rule, state, site, 100 * number + len(site) + ord(site[0])) for site in sites}
    for site, whole in trained.items():
        rule.add(Update(site, whole.only(whole.spec.select("share")), WEIGHTS[site]))
    return rule.result(), trained


def _mean(trained: Mapping[str, AdapterState], position: int) -> np.ndarray:
    """sum p_k (dW of site k), dense, with what its base weights had added before."""
    total = sum(WEIGHTS[site] for site in trained)
    dense = sum(WEIGHTS[site] * whole.delta(whole.spec.pairs[position]) for site, whole in trained.items())
    return np.asarray(dense) / total


def _same(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


CASES: dict[str, dict[str, Any]] = {
    "alpha over rank": {},
    "alpha over root of rank": {"root": True},
    "transposed base": {"flipped": True},
    "no multiple": {"alpha": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_every_round_adds_the_dense_mean_of_mixed_ranks_to_the_base(case: str) -> None:
    rule = _rule()
    state = rule.prepare(_fresh(_spec(**CASES[case])))
    base = [np.zeros(shape) for shape in SHAPES]
    for number in range(1, 6):
        before = state
        state, trained = _round(rule, state, number)
        for position, pair in enumerate(state.spec.pairs):
            # The equation itself, with nothing but the factors that were sent.
            for site, whole in trained.items():
                own, p = whole.spec.pairs[position], WEIGHTS[site] / sum(WEIGHTS.values())
                a, b = whole[pair.a].astype(np.float64), whole[pair.b].astype(np.float64)
                assert a.shape[0] == RANKS[site]
                base[position] += p * own.scaling * (b @ a)
            _same(state.delta(pair), base[position])
            _same(state.delta(pair), _mean(trained, position))
            assert not state[pair.b].any()
            assert state[pair.a].shape == before[pair.a].shape
        bias = sum(WEIGHTS[site] * whole["bias"].astype(np.float64) for site, whole in trained.items())
        np.testing.assert_allclose(state["bias"], bias / sum(WEIGHTS.values()), rtol=1e-6)
        assert np.array_equal(state["frozen"], before["frozen"])


def test_averaging_factors_would_be_far_from_it() -> None:
    """The dense mean is no easy one: FedIT misses it by more than a third of its size."""
    rule = _rule({})
    state, trained = _round(rule, _fresh(_spec()), 1)
    fedit = create_aggregator("fedit")
    fedit.start_round(state)
    for site, whole in trained.items():
        fedit.add(Update(site, whole.only(whole.spec.select("share")), WEIGHTS[site]))
    mean = fedit.result()
    for position, pair in enumerate(state.spec.pairs):
        want = _mean(trained, position)
        error = mean.spec.pairs[position].scaling * (mean[pair.b].astype(float) @ mean[pair.a].astype(float)) - want
        assert np.linalg.norm(error) > np.linalg.norm(want) / 3


def test_one_site_is_the_identity() -> None:
    for site in WEIGHTS:
        rule, state = _rule(), _fresh(_spec())
        for number in (1, 2, 3):
            state, trained = _round(rule, state, number, [site])
            for position, pair in enumerate(state.spec.pairs):
                _same(state.delta(pair), trained[site].delta(trained[site].spec.pairs[position]))
            assert np.array_equal(state["bias"], trained[site]["bias"])


def test_the_order_of_the_sites_does_not_matter() -> None:
    start, _ = _round(_rule(), _fresh(_spec()), 1)
    want, _ = _round(_rule(), start, 2)
    for order in itertools.permutations(WEIGHTS):
        got, _ = _round(_rule(), start, 2, order)
        assert got.spec == want.spec
        for pair in got.spec.pairs:
            _same(got.delta(pair), want.delta(pair))


def test_a_site_that_missed_rounds_is_right_when_it_comes_back() -> None:
    rule, state = _rule(), _fresh(_spec())
    for number in (1, 2, 3):
        state, _ = _round(rule, state, number, ["east", "north"])
    received = rule.for_site(state, "south")
    for position, pair in enumerate(state.spec.pairs):
        assert received[pair.a].shape[0] == 1
        # All of the change, and an adapter of its own rank that adds nothing yet.
        np.testing.assert_array_equal(received.delta(received.spec.pairs[position]), state.delta(pair))
    state, trained = _round(rule, state, 4, ["south"])
    for position, pair in enumerate(state.spec.pairs):
        _same(state.delta(pair), _mean(trained, position))


def test_a_run_goes_on_from_a_file(tmp_path: Path) -> None:
    state, _ = _round(_rule(), _fresh(_spec()), 1)
    state.save(tmp_path / "state.safetensors")
    loaded = AdapterState.load(tmp_path / "state.safetensors")
    assert loaded == state
    assert _round(_rule(), loaded, 2)[0] == _round(_rule(), state, 2)[0]


def test_the_rank_of_the_change_is_no_larger_than_it_must_be() -> None:
    rule, state = _rule(), _fresh(_spec())
    found = []
    for number in range(1, 6):
        state, _ = _round(rule, state, number)
        found.append([len(state[offset_a(pair)]) for pair in state.spec.pairs])
    # Seven new directions a round, until there is no room for more.
    assert found == [[7, 7], [9, 8], [9, 8], [9, 8], [9, 8]]
    for (m, n), pair in zip(SHAPES, state.spec.pairs, strict=True):
        assert state[offset_b(pair)].shape == (m, min(m, n)) and state[offset_a(pair)].shape == (min(m, n), n)


def test_directions_that_are_zero_are_dropped() -> None:
    rule, state = _rule({}), _fresh(_spec())
    rule.start_round(state)
    received = rule.for_site(state, "east")
    other = dict(_drawn(received.spec, 1))
    other["0.b"] = np.zeros_like(other["0.b"])
    other["1.b"] = np.outer(np.arange(8), np.ones(4)).astype("float32")
    names = received.spec.select("share")
    for site in ("east", "north"):
        rule.add(Update(site, AdapterState(received.spec, {n: other[n] for n in names}, names=names), WEIGHTS[site]))
    result = rule.result()
    assert offset_a(result.spec.pairs[0]) not in result
    assert len(result[offset_a(result.spec.pairs[1])]) == 1


def test_an_adapter_that_the_run_starts_from_goes_to_the_base_whole() -> None:
    """A site of rank 1 would get a quarter of it otherwise."""
    given = _drawn(_spec(), 7)
    rule = _rule()
    state = rule.prepare(given)
    assert rule.prepare(_fresh(_spec())) == _fresh(_spec())
    for site in RANKS:
        received = rule.for_site(state, site)
        for pair, own in zip(given.spec.pairs, received.spec.pairs, strict=True):
            _same(received.delta(own), given.delta(pair))
            assert not received[pair.b].any()
    state, trained = _round(rule, state, 1)
    for position, pair in enumerate(state.spec.pairs):
        _same(state.delta(pair), _mean(trained, position))


def test_other_extras_stay_beside_the_change() -> None:
    spec = _spec().with_extras([TensorSpec("mask", (3,), policy="freeze", parameter=False)])
    state, _ = _round(_rule(), _fresh(spec), 1)
    assert next(t.name for t in state.spec.extras) == "mask"
    assert np.array_equal(state["mask"], _fresh(spec)["mask"])
    assert len(state.spec.extras) == 5


def test_new_factors_are_uniform_and_hang_on_seed_round_and_layer() -> None:
    def factors(number: int, **options: Any) -> list[np.ndarray]:
        state, _ = _round(_rule(**options), _fresh(wide), number)
        return [state[pair.a] for pair in state.spec.pairs]

    pairs = (LowRankPair("x.a", "x.b", 1.0), LowRankPair("y.a", "y.b", 1.0))
    shapes = {"x.a": (4, 3000), "x.b": (5, 4), "y.a": (4, 3000), "y.b": (5, 4), "bias": (1,)}
    wide = AdapterSpec("lora", tuple(TensorSpec(n, s) for n, s in shapes.items()), pairs, rank=4, alpha=4.0)
    one = factors(1)
    bound = 1 / np.sqrt(3000)
    for a in one:
        assert np.abs(a).max() <= bound
        # 12,000 draws: the standard deviation of a uniform is bound / sqrt(3), its estimate's error about 0.5 %.
        assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.03)
        assert np.mean(a) == pytest.approx(0, abs=0.02 * bound)
    assert all(np.array_equal(a, b) for a, b in zip(one, factors(1), strict=True))
    others = [one[1], factors(2)[0], factors(1, seed=1)[0]]
    assert not any(np.array_equal(one[0], other) for other in others)


def test_a_method_without_factors_is_refused() -> None:
    spec = AdapterSpec("bitfit", (TensorSpec("bias", (3,)),))
    with pytest.raises(UserError, match="strategy `flora` works on the factors of a low-rank method; bitfit has none"):
        _rule().prepare(_drawn(spec, 0))


def test_one_factor_alone_is_refused() -> None:
    rule, state = _rule({}), _fresh(_spec())
    rule.start_round(state)
    whole = _trained(rule, state, "east", 1)
    with pytest.raises(UserError, match=r"east: tensor 0\.a is not shared, so dW is unknown; share both factors"):
        rule.add(Update("east", whole.only([n for n in whole.spec.select("share") if n != "0.a"]), 1.0))


def test_a_stack_of_many_terms_is_flat_and_loses_nothing() -> None:
    for shape in ((9, 30), (30, 9), (12, 12)):
        random = np.random.default_rng(1)
        total, dense = StackedSum(*shape), np.zeros(shape)
        for k in range(300):
            r = 1 + k % 5
            b, a = random.standard_normal((shape[0], r)), random.standard_normal((r, shape[1]))
            total.add(0.1 * k, b, a)
            dense += 0.1 * k * (b @ a)
            assert total.rank <= 2 * min(shape)
        left, right = total.factors()
        assert np.linalg.norm(left @ right - dense) <= 1e-13 * np.linalg.norm(dense)
        left, right = total.least()
        assert len(right) == min(shape)
        assert np.linalg.norm(left @ right - dense) <= 1e-13 * np.linalg.norm(dense)
        np.testing.assert_allclose(left.T @ left, right @ right.T, atol=float(1e-9 * np.linalg.norm(dense)))


def test_a_cap_keeps_the_best_of_that_rank() -> None:
    random = np.random.default_rng(2)
    b, a = random.standard_normal((20, 8)), random.standard_normal((8, 15))
    total = StackedSum(20, 15)
    total.add(1.0, b, a)
    u, s, vt = np.linalg.svd(b @ a)
    left, right = total.least(3)
    np.testing.assert_allclose(left @ right, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-12)


def test_terms_that_cancel_leave_nothing() -> None:
    random = np.random.default_rng(3)
    b, a = random.standard_normal((20, 4)), random.standard_normal((4, 15))
    total = StackedSum(20, 15)
    for weight in (1e6, -3e5, -7e5):
        total.add(weight, b, a)
    left, right = total.least()
    assert left.shape == (20, 0) and right.shape == (0, 15)
    empty_left, empty_right = StackedSum(20, 15).least()
    assert empty_left.shape == (20, 0) and empty_right.shape == (0, 15)


@pytest.mark.parametrize("name", ["flora", "fedex", "frlora", "lora-fair", "flora-na"])
def test_no_matrix_of_the_full_size_is_formed(name: str) -> None:
    m = n = 3000  # 72 MB in float64
    spec = AdapterSpec(
        "lora",
        (TensorSpec("a", (2, n)), TensorSpec("b", (m, 2)), TensorSpec("bias", (1,))),
        (LowRankPair("a", "b", 2.0),),
        rank=2,
        alpha=4.0,
    )
    rule = create_aggregator(name, {"factors": "initial"} if name == "frlora" else {})
    state = rule.prepare(_begun(_drawn(spec, 0)))
    tracemalloc.start()
    try:
        rule.start_round(state)
        for k in range(6):
            rule.add(Update(f"s{k}", _drawn(spec, k), 1.0))
        rule.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.2 * m * n * 8


def _begun(state: AdapterState) -> AdapterState:
    return AdapterState(state.spec, {**state, "b": np.zeros_like(state["b"])})


def test_a_float64_adapter_stays_one() -> None:
    spec = _spec()
    precise = replace(spec, tensors=tuple(replace(t, dtype="float64") for t in spec.tensors))
    state, _ = _round(_rule(), _fresh(precise), 1)
    assert {state[n].dtype.name for n in state.spec.bare.names} == {"float64"}
