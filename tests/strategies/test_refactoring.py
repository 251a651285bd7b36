"""FlexLoRA, HLoRA and raFLoRA against their equations on dense matrices, with mixed ranks, scalings and layouts."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.refactoring import truncated

NAMES = ("flexlora", "hlora", "raflora")
#: (m, n) of the pairs: wide, tall in the transposed layout, and one whose m is below the rank.
SHAPES = {"q": (14, 19), "v": (17, 12), "out": (3, 11)}
RANK, ALPHA = 6, 9.0


def _spec(rank: int = RANK, *, shapes: Mapping[str, tuple[int, int]] = SHAPES, transposed: str = "v") -> AdapterSpec:
    tensors, pairs = [], []
    for name, (m, n) in shapes.items():
        tensors += [TensorSpec(f"{name}.a", (RANK, n)), TensorSpec(f"{name}.b", (m, RANK))]
        pairs.append(LowRankPair(f"{name}.a", f"{name}.b", ALPHA / RANK, fan_in_fan_out=name == transposed))
    tensors += [TensorSpec("head", (4, 2), role="head"), TensorSpec("bias", (5,), role="bias")]
    return AdapterSpec("lora", tuple(tensors), tuple(pairs), rank=RANK, alpha=ALPHA).with_rank(rank)


SPEC = _spec()


def _draw(seed: int, spec: AdapterSpec = SPEC, size: float = 1.0) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: (size * random.standard_normal(t.shape)).astype(t.dtype) for t in spec.tensors})


START = AdapterState(SPEC, {n: a if not n.endswith(".b") else np.zeros_like(a) for n, a in _draw(99).items()})


def _aggregate(
    name: str,
    updates: Sequence[tuple[AdapterState, float]],
    *,
    ranks: Mapping[str, int] | None = None,
    start: AdapterState = START,
    **options: Any,
) -> AdapterState:
    rule = create_aggregator(name, options)
    rule.ranks = ranks if ranks is not None else {f"s{k}": s.spec.rank or 0 for k, (s, _) in enumerate(updates)}
    start = rule.prepare(start)
    rule.round = 1
    rule.start_round(start)
    for k, (state, weight) in enumerate(updates):
        rule.add(Update(f"s{k}", state, weight))
    return rule.result().filled_from(start)


def _mean(updates: Sequence[tuple[AdapterState, float]], number: int) -> np.ndarray:
    total = sum(weight for _, weight in updates)
    return sum(weight / total * state.delta(state.spec.pairs[number]) for state, weight in updates)


def _best(dense: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _near(got: np.ndarray, want: np.ndarray, within: float = 1e-6) -> bool:
    return float(np.linalg.norm(got - want)) <= within * float(np.linalg.norm(want))


MIXED = [(_draw(0, _spec(2)), 3.0), (_draw(1, _spec(6)), 1.0), (_draw(2, _spec(3)), 5.0)]


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_the_result_is_the_best_rank_r_part_of_the_weighted_mean(name: str) -> None:
    got = _aggregate(name, MIXED)
    for number, pair in enumerate(SPEC.pairs):
        assert _near(got.delta(pair), _best(_mean(MIXED, number), RANK))
        if number < 2:  # the third has rank 3 at most, and loses nothing
            assert not _near(got.delta(pair), _mean(MIXED, number), 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_is_exact_where_its_rank_allows(name: str) -> None:
    updates = [(_draw(seed, _spec(2)), weight) for seed, weight in ((0, 0.5), (1, 2.0), (2, 7.0))]
    got = _aggregate(name, updates)
    for number, pair in enumerate(SPEC.pairs):
        assert _near(got.delta(pair), _mean(updates, number))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_one_site_comes_back_as_itself(name: str, rank: int) -> None:
    update = _draw(4, _spec(rank))
    got = _aggregate(name, [(update, 3.0)], ranks={"s0": rank, "s1": 2})
    for pair, own in zip(SPEC.pairs, update.spec.pairs, strict=True):
        assert _near(got.delta(pair), update.delta(own))
    for tensor in ("head", "bias"):
        np.testing.assert_allclose(got[tensor], update[tensor], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_biases_are_averaged_by_weight(name: str) -> None:
    got = _aggregate(name, MIXED)
    for tensor in ("head", "bias"):
        want = sum(weight * state[tensor].astype(np.float64) for state, weight in MIXED) / 9.0
        np.testing.assert_allclose(got[tensor], want, rtol=1e-6, atol=1e-7)


def test_flexlora_gives_orthonormal_rows_and_hlora_two_factors_of_one_size() -> None:
    flex, even = _aggregate("flexlora", MIXED), _aggregate("hlora", MIXED)
    for pair in SPEC.pairs[:2]:
        a = flex[pair.a].astype(np.float64)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)
        b = flex[pair.b].astype(np.float64)
        assert (np.diff(np.linalg.norm(b, axis=0)) < 0).all(), "columns in the order of their singular values"
        left, right = even[pair.b].astype(np.float64), even[pair.a].astype(np.float64)
        np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-5)
        assert _near(even.delta(pair), flex.delta(pair))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaling", ["plain", "sqrt"])
def test_a_site_of_smaller_rank_receives_the_best_part_of_its_rank(name: str, scaling: str) -> None:
    spec = replace(SPEC, options={"scaling": scaling})
    rule = create_aggregator(name)
    rule.ranks = {"small": 2, "large": RANK}
    state = rule.prepare(_draw(5, spec))
    got = rule.for_site(state, "small")
    assert got.spec == spec.with_rank(2)
    for pair, own in zip(spec.pairs, got.spec.pairs, strict=True):
        assert _near(got.delta(own), _best(state.delta(pair), 2))
    assert rule.for_site(state, "large") is state
    assert np.array_equal(got["head"], state["head"])


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_from_elsewhere_is_ordered_and_stays_what_it_is(name: str) -> None:
    start = _draw(6)
    rule = create_aggregator(name)
    prepared = rule.prepare(start)
    for pair in SPEC.pairs:
        assert _near(prepared.delta(pair), start.delta(pair))
    assert rule.prepare(START) is START, "without a change there is nothing to order"


def test_a_cut_adapter_keeps_the_size_of_its_change() -> None:
    """alpha / r grows as the rank falls; B takes that up, or the site would start from another function."""
    state = _draw(7)
    cut = truncated(state, 2)
    for pair, own in zip(SPEC.pairs, cut.spec.pairs, strict=True):
        assert own.scaling == pytest.approx(3 * pair.scaling)
        want = pair.scaling * state[pair.b][:, :2].astype(np.float64) @ state[pair.a][:2].astype(np.float64)
        assert _near(cut.delta(own), want)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_the_base_weights_does_not_matter(name: str) -> None:
    plain, turned = _aggregate(name, MIXED), None
    other = [(state.with_spec(_spec(state.spec.rank or 0, transposed="q")), weight) for state, weight in MIXED]
    turned = _aggregate(name, other, start=START.with_spec(_spec(transposed="q")))
    assert dict(plain).keys() == dict(turned).keys()
    assert all(np.array_equal(plain[tensor], turned[tensor]) for tensor in plain)


# raFLoRA


def _sliced(updates: Sequence[tuple[AdapterState, float]], number: int) -> np.ndarray:
    """The published sum, slice by slice."""
    m, n = list(SHAPES.values())[number]
    total = np.zeros((m, n))
    for h in range(RANK):
        have = [(s, w) for s, w in updates if (s.spec.rank or 0) > h]
        share = sum(w for _, w in have)
        for state, weight in have:
            pair = state.spec.pairs[number]
            column, row = state[pair.b][:, h].astype(np.float64), state[pair.a][h].astype(np.float64)
            total += weight / share * pair.scaling * np.outer(column, row)
    return total


@pytest.mark.parametrize("known", [True, False])
def test_raflora_averages_each_slice_over_the_sites_that_have_it(known: bool) -> None:
    ranks = None if known else {}
    got = _aggregate("raflora", MIXED, ranks=ranks)
    for number, pair in enumerate(SPEC.pairs):
        assert _near(got.delta(pair), _best(_sliced(MIXED, number), RANK))
        assert not _near(got.delta(pair), _best(_mean(MIXED, number), RANK), 0.05)


def test_raflora_with_equal_ranks_is_flexlora() -> None:
    updates = [(_draw(seed), 1.0 + seed) for seed in range(3)]
    one, two = _aggregate("raflora", updates), _aggregate("flexlora", updates)
    for tensor in one:
        np.testing.assert_allclose(one[tensor], two[tensor], atol=1e-5)


def test_raflora_mends_the_collapse_of_rank() -> None:
    """Sites that learn nothing: flexlora shrinks what only the one large site of ten has tenfold a round."""
    ranks = {f"s{k}": 2 for k in range(9)} | {"s9": RANK}
    start = _draw(8)
    values = {}
    for name in ("flexlora", "raflora"):
        rule = create_aggregator(name)
        rule.ranks = ranks
        state = rule.prepare(start)
        for round in range(1, 4):
            rule.round = round
            rule.start_round(state)
            for site in ranks:
                rule.add(Update(site, rule.for_site(state, site), 1.0))
            state = rule.result().filled_from(state)
        values[name] = np.linalg.svd(state.delta(SPEC.pairs[0]), compute_uv=False)
    before = np.linalg.svd(start.delta(SPEC.pairs[0]), compute_uv=False)
    np.testing.assert_allclose(values["raflora"][:RANK], before[:RANK], rtol=1e-5)
    np.testing.assert_allclose(values["flexlora"][:2], before[:2], rtol=1e-5)
    np.testing.assert_allclose(values["flexlora"][2:RANK], before[2:RANK] / 1000, rtol=1e-3)


def test_raflora_refuses_a_rank_that_no_site_was_given() -> None:
    with pytest.raises(UserError, match="s0: has rank 3, which no site of this run was given"):
        _aggregate("raflora", [(_draw(0, _spec(3)), 1.0)], ranks={"s0": 2, "s1": 6})


# Edges


@pytest.mark.parametrize("name", NAMES)
def test_slices_that_no_site_sent_can_train_again(name: str) -> None:
    """B is zero there, and A has unit rows: dW is the rule's, and the gradient of B is not zero."""
    got = _aggregate(name, [(_draw(1, _spec(2)), 1.0)], ranks={"s0": 2, "s1": 6})
    for pair in SPEC.pairs[:2]:
        assert not got[pair.b][:, 2:].any()
        tail = got[pair.a][2:].astype(np.float64)
        np.testing.assert_allclose(tail @ tail.T, np.eye(4), atol=1e-6)
        np.testing.assert_allclose(got[pair.a][:2].astype(np.float64) @ tail.T, 0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_zero_stays_zero_and_trainable(name: str) -> None:
    got = _aggregate(name, [(START, 1.0), (START, 2.0)])
    for pair in SPEC.pairs:
        assert not got[pair.b].any()
        assert (np.linalg.norm(got[pair.a], axis=1) > 0.5).all()


@pytest.mark.parametrize("name", [*NAMES, "hetlora"])
def test_half_a_pair_is_refused_and_a_pair_that_rests_is_kept(name: str) -> None:
    state = _draw(1)
    rule = create_aggregator(name)
    rule.ranks = {"north": RANK}
    start = rule.prepare(START)
    rule.start_round(start)
    half = state.only(set(state) - {"q.b"})
    with pytest.raises(UserError, match=r"^north: tensor q\.b is not shared, so dW is unknown; share both factors$"):
        rule.add(Update("north", half, 1.0))
    rule.start_round(start)
    rule.add(Update("north", state.only(set(state) - {"q.a", "q.b"}), 1.0))
    got = rule.result()
    assert "q.a" not in got and "q.b" not in got and "v.a" in got


@pytest.mark.parametrize("name", [*NAMES, "hetlora", "fedsvd", "fedask"])
def test_a_method_without_factors_is_refused(name: str) -> None:
    spec = AdapterSpec("bitfit", (TensorSpec("bias", (3,)),))
    with pytest.raises(UserError, match=f"`{name}` works on the factors of a low-rank method; bitfit has none"):
        create_aggregator(name).prepare(AdapterState(spec, {"bias": np.zeros(3, np.float32)}))


@pytest.mark.parametrize("name", [*NAMES, "hetlora"])
def test_a_round_without_updates_is_refused(name: str) -> None:
    rule = create_aggregator(name)
    rule.start_round(START)
    with pytest.raises(UserError, match="no update arrived"):
        rule.result()


@pytest.mark.parametrize("name", NAMES)
def test_many_sites_stay_near_the_best_and_in_bounded_memory(name: str) -> None:
    m, n, r = 400, 380, 4
    spec = AdapterSpec(
        "lora", (TensorSpec("a", (r, n)), TensorSpec("b", (m, r))), (LowRankPair("a", "b", 0.5),), rank=r, alpha=2.0
    )
    start = _draw(0, spec)
    peaks, dense = [], np.zeros((m, n))
    for count in (60, 240):
        rule = create_aggregator(name)
        rule.ranks = {f"s{k:03}": r for k in range(count)}
        state = rule.prepare(start)
        dense[:] = 0
        drawn = np.random.default_rng(2)
        tracemalloc.start()
        rule.start_round(state)
        for site in rule.ranks:
            noise = {t: drawn.standard_normal(x.shape, dtype=np.float32) for t, x in start.items()}
            rule.add(Update(site, start + AdapterState(spec, noise), 1.0))
        got = rule.result()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]
    drawn = np.random.default_rng(2)
    for _ in rule.ranks:
        noise = {t: drawn.standard_normal(x.shape, dtype=np.float32) for t, x in start.items()}
        site_state = start + AdapterState(spec, noise)
        dense += site_state.delta(spec.pairs[0]) / len(rule.ranks)
    least = np.linalg.norm(dense - _best(dense, r))
    assert least <= np.linalg.norm(got.delta(spec.pairs[0]) - dense) <= 1.3 * least


def test_a_federation_of_mixed_ranks_learns(tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> None:
    sites = [{"name": site, "rank": rank} for site, rank in zip(("east", "north", "south"), (1, 4, 2), strict=True)]
    config = tiny_federation.config(strategy="flexlora", rounds=3, **{"train.lr": 0.05, "data.sites": sites})
    tiny_federation.run(config, tmp_path / "run")
    learned = [line["accuracy"] for line in tinyfederation.metrics(tmp_path / "run", "evaluate")]
    assert learned[0] < 0.4 and learned[-1] > 0.6
