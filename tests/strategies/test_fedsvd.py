"""FedSVD: exact, its factorisation changes no dW, and under SGD it is FFA in other coordinates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator

#: The second pair has fewer rows than its rank: there dW cannot have rank r.
SHAPES = {"q": (8, 11), "out": (2, 9)}
FACTORS = [
    TensorSpec(f"{name}.{side}", (4, n) if side == "a" else (m, 4), dtype="float64")
    for name, (m, n) in SHAPES.items()
    for side in "ab"
]
SPEC = AdapterSpec(
    "lora",
    (*FACTORS, TensorSpec("head", (3,), dtype="float64")),
    tuple(LowRankPair(f"{name}.a", f"{name}.b", 0.75) for name in SHAPES),
    rank=4,
    alpha=3.0,
)


def _draw(seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape) for t in SPEC.tensors})


def _fresh(seed: int) -> AdapterState:
    state = _draw(seed)
    return AdapterState(SPEC, {n: np.zeros_like(a) if n.endswith(".b") else a for n, a in state.items()})


def _trained(state: AdapterState, seed: int) -> AdapterState:
    """The shared tensors after a training that moved them at random."""
    random = np.random.default_rng(seed)
    shared = state.only(state.spec.select("share"))
    return shared.map(lambda array: array + random.standard_normal(array.shape))


def test_the_result_is_the_mean_of_the_changes_exactly_and_a_has_orthonormal_rows() -> None:
    rule = create_aggregator("fedsvd")
    assert rule.capabilities.exact and rule.capabilities.linear_sum and rule.capabilities.resets_state
    state = rule.prepare(_fresh(0))
    for round in range(1, 4):
        rule.round = round
        rule.start_round(state)
        updates = [(_trained(state, 10 * round + k), w) for k, w in enumerate((1.0, 4.0, 2.5))]
        for k, (update, weight) in enumerate(updates):
            rule.add(Update(f"s{k}", update, weight))
        got = rule.result()
        assert got.spec == state.spec
        for pair in SPEC.pairs:
            want = sum(w * u.filled_from(state).delta(pair) for u, w in updates) / 7.5
            np.testing.assert_allclose(got.delta(pair), want, atol=1e-12)
            a, b = got[pair.a], got[pair.b]
            np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-12)
            square = b.T @ b
            np.testing.assert_allclose(square, np.diag(np.diag(square)), atol=1e-10)
            assert (np.diff(np.diag(square)) <= 1e-12).all(), "columns of B in the order of their singular values"
        state = got


def test_a_is_frozen_and_orthonormal_from_the_start_and_the_start_keeps_its_change() -> None:
    for start in (_fresh(1), _draw(1)):
        prepared = create_aggregator("fedsvd").prepare(start)
        assert set(prepared.spec.select("freeze")) == {"q.a", "out.a"}
        for pair in SPEC.pairs:
            np.testing.assert_allclose(prepared[pair.a] @ prepared[pair.a].T, np.eye(4), atol=1e-12)
            np.testing.assert_allclose(prepared.delta(pair), start.delta(pair), atol=1e-12)


def test_the_row_space_never_leaves_its_start() -> None:
    """What the method cannot do, whatever the sites learn: the projection onto the rows of A stays."""
    rule = create_aggregator("fedsvd")
    state = rule.prepare(_fresh(2))
    first = {pair.a: state[pair.a].T @ state[pair.a] for pair in SPEC.pairs}
    turned = 0.0
    for round in range(1, 6):
        rule.round = round
        rule.start_round(state)
        rule.add(Update("one", _trained(state, round), 1.0))
        after = rule.result()
        turned = max(turned, float(np.abs(after["q.a"] - state["q.a"]).max()))
        state = after
        for pair in SPEC.pairs:
            np.testing.assert_allclose(state[pair.a].T @ state[pair.a], first[pair.a], atol=1e-12)
    assert turned > 0.1, "the rows themselves did turn"


@pytest.mark.parametrize(("momentum", "same"), [(0.0, True), (0.9, True), (None, False)])
def test_under_sgd_it_is_ffa_with_orthonormal_rows(momentum: float | None, same: bool) -> None:
    """Least squares on dW, local steps of SGD; ``None``: steps by signs, which weigh coordinates."""
    random = np.random.default_rng(3)
    pair = SPEC.pairs[0]
    target = [random.standard_normal((8, 11)) for _ in range(2)]
    start = create_aggregator("fedsvd").prepare(_fresh(4))

    def train(state: AdapterState, goal: np.ndarray) -> AdapterState:
        a, b = state[pair.a], state[pair.b].copy()
        speed = np.zeros_like(b)
        for _ in range(3):
            gradient = pair.scaling * (pair.scaling * b @ a - goal) @ a.T
            speed = np.sign(gradient) if momentum is None else momentum * speed + gradient
            b -= 0.1 * speed
        return AdapterState(state.spec, {**state, pair.b: b}).only(state.spec.select("share"))

    changes = {}
    for name in ("ffa", "fedsvd"):
        rule = create_aggregator(name, {"basis": "random"} if name == "ffa" else {})
        state = rule.prepare(start.with_spec(SPEC))
        for round in range(1, 4):
            rule.round = round
            rule.start_round(state)
            for k, goal in enumerate(target):
                rule.add(Update(f"s{k}", train(state, goal), 1.0 + k))
            state = rule.result().filled_from(state)
        changes[name] = state.delta(pair)
    assert np.allclose(changes["ffa"], changes["fedsvd"], atol=1e-12) is same


def test_the_factorisation_may_rest_for_some_rounds() -> None:
    rule = create_aggregator("fedsvd", {"every": 2})
    state = rule.prepare(_fresh(5))
    kept = []
    for round in range(1, 5):
        rule.round = round
        rule.start_round(state)
        rule.add(Update("one", _trained(state, round), 1.0))
        after = rule.result()
        kept.append(np.array_equal(after["q.a"], state["q.a"]))
        state = after
    assert kept == [True, False, True, False]


def test_more_rows_than_columns_stay_as_they_are() -> None:
    """They cannot be orthonormal; dW is averaged exactly all the same."""
    narrow = replace(
        SPEC,
        tensors=(TensorSpec("a", (4, 3), dtype="float64"), TensorSpec("b", (5, 4), dtype="float64")),
        pairs=(LowRankPair("a", "b", 1.0),),
    )
    random = np.random.default_rng(6)
    start = AdapterState(narrow, {t.name: random.standard_normal(t.shape) for t in narrow.tensors})
    rule = create_aggregator("fedsvd")
    state = rule.prepare(start)
    rule.round = 1
    rule.start_round(state)
    update = _trained(state, 7)
    rule.add(Update("one", update, 2.0))
    got = rule.result()
    assert np.array_equal(got["a"], start["a"])
    np.testing.assert_allclose(got["b"], update["b"], rtol=1e-14)
