"""HetLoRA: padded averages against their equation, and what a site does to its own rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import LocalRule, Training, create_aggregator

RANK = 6
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("q.a", (RANK, 9)),
        TensorSpec("q.b", (7, RANK)),
        TensorSpec("v.a", (RANK, 5)),
        TensorSpec("v.b", (8, RANK)),
        TensorSpec("head", (3,)),
    ),
    (LowRankPair("q.a", "q.b", 2.0), LowRankPair("v.a", "v.b", 2.0, fan_in_fan_out=True)),
    rank=RANK,
    alpha=12.0,
)


def _draw(seed: int, rank: int = RANK) -> AdapterState:
    random = np.random.default_rng(seed)
    spec = SPEC.with_rank(rank)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


START = _draw(50)
MIXED = [(_draw(0, 2), 3.0), (_draw(1, 4), 1.0), (_draw(2, 3), 5.0)]


def _aggregate(
    updates: Sequence[tuple[AdapterState, float]], start: AdapterState = START, **options: Any
) -> AdapterState:
    rule = create_aggregator("hetlora", options)
    rule.start_round(rule.prepare(start))
    for k, (state, weight) in enumerate(updates):
        rule.add(Update(f"s{k}", state, weight))
    return rule.result()


@pytest.mark.parametrize("by_records", [True, False])
def test_factors_are_padded_with_zeros_and_weighed_by_the_norm_of_their_product(by_records: bool) -> None:
    got = _aggregate(MIXED, by_records=by_records)
    for number, pair in enumerate(SPEC.pairs):
        sizes = np.array([np.linalg.norm(state.delta(state.spec.pairs[number])) for state, _ in MIXED])
        shares = sizes * (np.array([w for _, w in MIXED]) if by_records else 1)
        shares = shares / shares.sum()
        a, b = np.zeros((RANK, START[pair.a].shape[1])), np.zeros((len(START[pair.b]), RANK))
        for (state, _), share in zip(MIXED, shares, strict=True):
            own = state.spec.pairs[number]
            rank = len(state[own.a])
            a[:rank] += share * state[own.a]
            b[:, :rank] += share * own.scaling / pair.scaling * state[own.b]
        np.testing.assert_allclose(got[pair.b], b, atol=1e-6)
        np.testing.assert_allclose(got[pair.a][:4], a[:4], atol=1e-6)
        assert np.array_equal(got[pair.a][4:], START[pair.a][4:]), "rows that nobody sent keep the server's values"
        np.testing.assert_allclose(got.delta(pair), pair.scaling * b @ a, atol=1e-5)


def test_heads_are_weighed_by_records_alone() -> None:
    want = sum(w * state["head"].astype(np.float64) for state, w in MIXED) / 9.0
    np.testing.assert_allclose(_aggregate(MIXED)["head"], want, rtol=1e-6)


def test_one_site_comes_back_as_itself() -> None:
    update = _draw(3, 2)
    got = _aggregate([(update, 4.0)])
    for pair, own in zip(SPEC.pairs, update.spec.pairs, strict=True):
        np.testing.assert_allclose(got.delta(pair), update.delta(own), atol=1e-5)


def test_changes_of_zero_are_averaged_by_records() -> None:
    """Before anything is learned all norms are zero, and no share can be made of them."""
    updates = [(AdapterState(s.spec, {n: a * (not n.endswith(".b")) for n, a in s.items()}), w) for s, w in MIXED]
    got = _aggregate(updates)
    want = sum(w * np.pad(s["q.a"].astype(np.float64), ((0, RANK - len(s["q.a"])), (0, 0))) for s, w in updates) / 9.0
    np.testing.assert_allclose(got["q.a"][:4], want[:4], atol=1e-6)
    assert not got["q.b"].any()


def test_a_site_receives_the_first_slices_with_their_change() -> None:
    rule = create_aggregator("hetlora")
    rule.ranks = {"small": 2, "large": RANK}
    got = rule.for_site(START, "small")
    assert got.spec == SPEC.with_rank(2)
    for pair, own in zip(SPEC.pairs, got.spec.pairs, strict=True):
        want = pair.scaling * START[pair.b][:, :2].astype(np.float64) @ START[pair.a][:2]
        np.testing.assert_allclose(got.delta(own), want, atol=1e-5)
    assert rule.for_site(START, "large") is START


# The site's side


def _rule(memory: Mapping[str, AdapterState] | None = None, **options: Any) -> LocalRule:
    rule = create_aggregator("hetlora", options).local(Training("s", 1, 4, 0.1), memory or {})
    assert rule is not None
    return rule


def _penalty(state: Mapping[str, np.ndarray], kept: int, rank: int) -> float:
    return sum(
        float(np.linalg.norm(state[pair.a][kept:rank]) * np.linalg.norm(state[pair.b][:, kept:rank]))
        for pair in SPEC.pairs
    )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_direction_is_the_gradient_of_the_penalty(kind: str) -> None:
    rule = _rule(gamma=0.5, penalty=0.3)
    state = {name: array.astype(np.float64) for name, array in rule.begin(START).items()}
    for name, value in state.items():
        gradient = np.random.default_rng(1).standard_normal(value.shape)
        kept = gradient.copy()
        if kind == "torch":
            out = rule.direction(name, torch.tensor(gradient), torch.tensor(value), torch.tensor(value), 0).numpy()
        else:
            out = rule.direction(name, gradient, value, value, 0)
        assert np.array_equal(gradient, kept), "the gradient that was handed in is left alone"
        for at in np.ndindex(value.shape):
            moved = []
            for step in (1e-6, -1e-6):
                other = {n: a.copy() for n, a in state.items()}
                other[name][at] += step
                moved.append(0.3 * _penalty(other, 3, RANK))
            assert out[at] - gradient[at] == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-5)


def test_without_a_penalty_the_gradient_stays() -> None:
    rule = _rule()
    rule.begin(START)
    gradient = np.random.default_rng(2).standard_normal(START["q.b"].shape)
    assert np.array_equal(rule.direction("q.b", gradient, START["q.b"], START["q.b"], 0), gradient)
    assert rule.direction("head", gradient, None, None, 0) is gradient


def _with_tail(state: AdapterState, factor: float, kept: int) -> AdapterState:
    tensors = {name: array.copy() for name, array in state.items()}
    for pair in state.spec.pairs:
        tensors[pair.a][kept:] *= factor
    return AdapterState(state.spec, tensors)


def test_a_tail_that_shrank_is_pruned_for_good() -> None:
    rule = _rule(gamma=0.7)  # of rank 6, 4 are kept
    received = rule.begin(START)
    assert received == START
    sent = rule.finish(_with_tail(START, 0.9, 4), START)
    for pair in SPEC.pairs:
        assert not sent[pair.a][4:].any() and not sent[pair.b][:, 4:].any()
        assert np.array_equal(sent[pair.a][:4], START[pair.a][:4])
    assert np.array_equal(sent["head"], START["head"])
    # The next round: the pruned slices begin at zero and stay there, and 2 of the 4 that are left are the tail.
    memory = rule.remember()
    again = _rule(memory, gamma=0.7)
    begun = again.begin(START)
    assert not begun["q.a"][4:].any() and not begun["v.b"][:, 4:].any()
    for name in ("q.a", "q.b"):
        out = again.direction(name, np.ones(START[name].shape), begun[name], begun[name], 0)
        rest, pruned = (out[:4], out[4:]) if name == "q.a" else (out[:, :4], out[:, 4:])
        assert not pruned.any() and (rest == 1).all()
    grown = again.finish(_with_tail(begun, 1.5, 2), START)
    assert grown["q.a"][2:4].any() and not grown["q.a"][4:].any()
    assert again.remember() == memory


def test_a_tail_that_grew_is_kept() -> None:
    rule = _rule(gamma=0.7)
    rule.begin(START)
    trained = _with_tail(START, 1.1, 4)
    assert dict(rule.finish(trained, START)).keys() == dict(trained).keys()
    assert all(np.array_equal(rule.finish(trained, START)[name], trained[name]) for name in trained)
    assert int(rule.remember()["hetlora-rank"]["rank"][0]) == RANK


@pytest.mark.parametrize(("gamma", "rank"), [(1.0, 6), (0.01, 6), (0.5, 1)])
def test_a_rank_is_never_pruned_away(gamma: float, rank: int) -> None:
    """gamma 1 prunes nothing, and at least one slice is kept."""
    state = _draw(1, rank)
    rule = _rule(gamma=gamma)
    rule.begin(state)
    sent = rule.finish(_with_tail(state, 0.5, 1) if rank > 1 else state, state)
    left = 6 if gamma == 1 else 1
    assert int(rule.remember()["hetlora-rank"]["rank"][0]) == left
    assert sent["q.a"][:left].any()


def test_pruning_is_the_site_s_own_and_padding_takes_it_in() -> None:
    """A pruned site still sends its rank's shapes; zeros in them weigh as padding does."""
    rule = _rule(gamma=0.7)
    rule.begin(START)
    sent = rule.finish(_with_tail(START, 0.9, 4), START)
    short = AdapterState(
        SPEC.with_rank(4),
        {
            name: array[:4]
            if name.endswith(".a")
            else array[:, :4] * np.float32(4 / 6)
            if name.endswith(".b")
            else array
            for name, array in sent.items()
        },
    )
    other = _draw(9)
    one, two = _aggregate([(sent, 2.0), (other, 1.0)]), _aggregate([(short, 2.0), (other, 1.0)])
    for pair in SPEC.pairs:
        np.testing.assert_allclose(one.delta(pair), two.delta(pair), atol=1e-5)
