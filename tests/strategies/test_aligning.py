"""LoRA-FAIR, FLoRA-NA and FedRot-LoRA against dense minimisations in float64, and what they must not change."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, LocalRule, Training, create_aggregator
from fedgraft.strategies.aligning import nearest_factors, rotation

M, N, RANK = 12, 15, 3
PAIR = LowRankPair("a", "b", 5.0 / 3)
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (RANK, N), "float64", role="lora_A"),
        TensorSpec("b", (M, RANK), "float64", role="lora_B"),
        TensorSpec("head", (2, 4), "float64", role="head"),
    ),
    (PAIR,),
    rank=RANK,
    alpha=5.0,
)
P = np.array([0.5, 0.3, 0.15, 0.05])


def _drawn(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


SITES = tuple(_drawn(seed) for seed in range(4))


def _result(
    rule: Aggregator, sites: Sequence[AdapterState] = SITES, weights: Sequence[float] = tuple(8 * P)
) -> AdapterState:
    rule.start_round(_drawn(99, sites[0].spec))
    for k, (site, weight) in enumerate(zip(sites, weights, strict=True)):
        rule.add(Update(f"site-{k}", site, weight))
    return rule.result()


def _target(sites: Sequence[AdapterState] = SITES, p: np.ndarray = P) -> np.ndarray:
    """sum p_k B_k A_k, dense."""
    return np.asarray(sum(w * (site["b"] @ site["a"]) for w, site in zip(p, sites, strict=True)))


def _missed(state: AdapterState, target: np.ndarray) -> float:
    return float(np.linalg.norm(target - state["b"] @ state["a"]))


@pytest.mark.parametrize("name", ["lora-fair", "flora-na", "fedrot"])
def test_one_site_heads_and_the_order_of_sites(name: str) -> None:
    rule = create_aggregator(name)
    alone = _result(rule, SITES[:1], [3.0])
    for tensor in SPEC.names:
        np.testing.assert_allclose(alone[tensor], SITES[0][tensor], rtol=1e-12, atol=1e-13)
    want = _result(rule)
    np.testing.assert_allclose(want["head"], sum(p * s["head"] for p, s in zip(P, SITES, strict=True)), rtol=1e-12)
    for order in itertools.permutations(range(4)):
        got = _result(rule, [SITES[i] for i in order], [P[i] for i in order])
        np.testing.assert_allclose(got["b"] @ got["a"], want["b"] @ want["a"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["lora-fair", "flora-na"])
def test_layout_and_scaling_do_not_matter_to_the_factors(name: str) -> None:
    flipped = AdapterSpec("lora", SPEC.tensors, (LowRankPair("a", "b", 0.01, True),), rank=RANK, alpha=0.03)
    other = _result(create_aggregator(name), [site.with_spec(flipped) for site in SITES])
    want = _result(create_aggregator(name))
    assert all(np.array_equal(other[tensor], want[tensor]) for tensor in want)


# LoRA-FAIR


def _ridge(a: np.ndarray, b: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    """argmin_D |target - (b + D) a|^2 + penalty |D|^2 by least squares on the dense, augmented system."""
    left = np.concatenate([a.T, np.sqrt(penalty) * np.eye(len(a))])
    right = np.concatenate([(target - b @ a).T, np.zeros((len(a), len(b)))])
    solution: np.ndarray = np.linalg.lstsq(left, right, rcond=None)[0].T
    return solution


@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0, 100.0])
def test_lora_fair_solves_the_penalised_alignment(penalty: float) -> None:
    got = _result(create_aggregator("lora-fair", {"penalty": penalty}))
    a, b = (sum(p * site[name] for p, site in zip(P, SITES, strict=True)) for name in "ab")
    target = _target()
    np.testing.assert_allclose(got["a"], a, rtol=1e-12)
    np.testing.assert_allclose(got["b"] - b, _ridge(got["a"], np.asarray(b), target, penalty), rtol=1e-8, atol=1e-10)

    def loss(factor: np.ndarray) -> float:
        return float(np.sum((target - factor @ a) ** 2) + penalty * np.sum((factor - b) ** 2))

    random = np.random.default_rng(0)
    for _ in range(50):
        assert loss(got["b"] + 1e-3 * random.standard_normal((M, RANK))) > loss(got["b"])


def test_the_penalty_of_lora_fair_goes_from_the_projection_to_fedit() -> None:
    target, fedit = _target(), _result(create_aggregator("fedit"))
    missed = [_missed(_result(create_aggregator("lora-fair", {"penalty": p})), target) for p in (0, 0.01, 1, 1e9)]
    assert missed == sorted(missed)
    assert missed[-1] == pytest.approx(_missed(fedit, target), rel=1e-6)
    rows = np.linalg.qr(fedit["a"].T)[0]
    assert missed[0] == pytest.approx(np.linalg.norm(target - target @ rows @ rows.T), rel=1e-10)
    assert missed[0] < 0.95 * missed[-1]


def test_lora_fair_bears_a_lost_direction_of_a() -> None:
    flat = [AdapterState(SPEC, {**site, "a": np.outer([1.0, 2.0, -1.0], site["a"][0])}) for site in SITES]
    for penalty in (0.0, 0.01):
        got = _result(create_aggregator("lora-fair", {"penalty": penalty}), flat)
        fedit = _result(create_aggregator("fedit"), flat)
        assert np.abs(got["b"]).max() < 100
        assert _missed(got, _target(flat)) <= _missed(fedit, _target(flat))


# FLoRA-NA


def _dense_loss(u: np.ndarray, v: np.ndarray, target: np.ndarray) -> float:
    a = sum(w * site["a"] for w, site in zip(u, SITES, strict=True))
    b = sum(w * site["b"] for w, site in zip(v, SITES, strict=True))
    return float(np.sum((target - np.asarray(b) @ np.asarray(a)) ** 2))


def _dense_sweeps(sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """The two regressions in turn, on matrices of the full size."""
    target, u, v = _target().reshape(-1), P, P
    for _ in range(sweeps):
        a = np.asarray(sum(w * site["a"] for w, site in zip(u, SITES, strict=True)))
        v = np.linalg.lstsq(np.stack([(site["b"] @ a).reshape(-1) for site in SITES], 1), target, rcond=None)[0]
        b = np.asarray(sum(w * site["b"] for w, site in zip(v, SITES, strict=True)))
        u = np.linalg.lstsq(np.stack([(b @ site["a"]).reshape(-1) for site in SITES], 1), target, rcond=None)[0]
    return u, v


@pytest.mark.parametrize("sweeps", [1, 2, 7])
def test_flora_na_is_two_regressions_in_turn(sweeps: int) -> None:
    got = _result(create_aggregator("flora-na", {"sweeps": sweeps}))
    u, v = _dense_sweeps(sweeps)
    np.testing.assert_allclose(got["a"], sum(w * s["a"] for w, s in zip(u, SITES, strict=True)), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(got["b"], sum(w * s["b"] for w, s in zip(v, SITES, strict=True)), rtol=1e-7, atol=1e-9)


def test_flora_na_comes_to_a_minimum_that_is_nearer_than_fedit() -> None:
    target = _target()
    missed = [_missed(_result(create_aggregator("flora-na", {"sweeps": n})), target) for n in (1, 3, 10, 1000)]
    fedit = _missed(_result(create_aggregator("fedit")), target)
    assert [fedit, *missed] == sorted([fedit, *missed], reverse=True)
    assert missed[-1] < 0.97 * fedit
    u, v = _dense_sweeps(1000)
    # A sweep that gains less than a millionth is the last.
    assert missed[-1] ** 2 == pytest.approx(_dense_loss(u, v, target), rel=1e-4)
    step = 1e-5
    for k in range(4):
        e = step * np.eye(4)[k]
        for more, less in (((u + e, v), (u - e, v)), ((u, v + e), (u, v - e))):
            slope = (_dense_loss(more[0], more[1], target) - _dense_loss(less[0], less[1], target)) / (2 * step)
            assert abs(slope) < 1e-3 * _dense_loss(u, v, target)
    # No combination of weights does better than the SVD.
    assert missed[-1] >= np.linalg.norm(np.linalg.svd(target, compute_uv=False)[RANK:])


def test_flora_na_keeps_the_means_where_there_is_nothing_to_fit() -> None:
    """Zero factors B (a first round in which nothing was learned) must not make the weights of A zero too."""
    idle = [AdapterState(SPEC, {**site, "b": np.zeros((M, RANK))}) for site in SITES]
    got, fedit = _result(create_aggregator("flora-na"), idle), _result(create_aggregator("fedit"), idle)
    np.testing.assert_allclose(got["a"], fedit["a"], rtol=1e-12)
    assert not got["b"].any()


def test_flora_na_takes_equal_sites_as_one() -> None:
    twice = _result(create_aggregator("flora-na"), [*SITES, SITES[0]], [1, 1.2, 0.6, 0.2, 1])
    want = _result(create_aggregator("flora-na"), SITES, [2, 1.2, 0.6, 0.2])
    np.testing.assert_allclose(twice["b"] @ twice["a"], want["b"] @ want["a"], rtol=1e-7, atol=1e-8)
    b, a = nearest_factors(np.array([0.4, 0.6]), np.stack([SITES[0]["b"]] * 2), np.stack([SITES[0]["a"]] * 2), 50)
    np.testing.assert_allclose(b, SITES[0]["b"], rtol=1e-10)
    np.testing.assert_allclose(a, SITES[0]["a"], rtol=1e-10)


# FedRot


def _rule(round: int, strength: float = 0.5) -> LocalRule:
    rule = create_aggregator("fedrot", {"strength": strength}).local(Training("east", round, 1, 0.1), {})
    assert rule is not None
    return rule


def _orthogonal(seed: int, r: int = RANK) -> np.ndarray:
    """A random rotation."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((r, r)))
    q[:, 0] *= np.sign(np.linalg.det(q))
    return np.asarray(q)


@pytest.mark.parametrize("round", [1, 2, 3, 4])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_turning_leaves_the_product_as_it_was(round: int, strength: float, dtype: str) -> None:
    spec = AdapterSpec("lora", tuple(TensorSpec(t.name, t.shape, dtype) for t in SPEC.tensors), (PAIR,), rank=RANK)
    trained, received = _drawn(1, spec), _drawn(2, spec)
    sent = _rule(round, strength).finish(trained, received)
    assert sent.spec == trained.spec and tuple(sent) == tuple(trained)
    want = trained.delta(PAIR)
    bound = 1e-6 if dtype == "float32" else 1e-14
    assert np.linalg.norm(sent.delta(PAIR) - want) <= bound * np.linalg.norm(want)
    assert np.array_equal(sent["head"], trained["head"])
    if strength:
        assert np.linalg.norm(sent["a"] - trained["a"]) > 0.1 * np.linalg.norm(trained["a"])
    else:
        np.testing.assert_allclose(sent["a"], trained["a"], rtol=1e-6, atol=1e-6)


def test_odd_rounds_turn_to_the_last_a_and_even_ones_to_the_last_b() -> None:
    """No other rotation of two directions comes nearer: all of them are tried."""
    spec = AdapterSpec(
        "lora", (TensorSpec("a", (2, N), "float64"), TensorSpec("b", (M, 2), "float64")), (PAIR,), rank=2
    )
    trained, received = _drawn(3, spec), _drawn(4, spec)
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in np.linspace(0, 2 * np.pi, 20001)]
    for round in (1, 2, 3):
        sent = _rule(round, 1.0).finish(trained, received)
        if round % 2:
            best = min(np.linalg.norm(turn.T @ trained["a"] - received["a"]) for turn in turns)
            got = np.linalg.norm(sent["a"] - received["a"])
        else:
            best = min(np.linalg.norm(trained["b"] @ turn - received["b"]) for turn in turns)
            got = np.linalg.norm(sent["b"] - received["b"])
        # The grid is 3e-4 wide, and the distance flat at its minimum.
        assert best - 1e-6 <= got <= best + 1e-9


def test_what_was_turned_is_turned_back() -> None:
    received = _drawn(5)
    for round in (1, 2):
        q = _orthogonal(round)
        turned = AdapterState(SPEC, {**received, "a": q.T @ received["a"], "b": received["b"] @ q})
        sent = _rule(round, 1.0).finish(turned, received)
        for name in "ab":
            np.testing.assert_allclose(sent[name], received[name], rtol=1e-10, atol=1e-12)


def test_sites_that_differ_by_a_rotation_are_averaged_exactly() -> None:
    received = _drawn(6)
    turned = [
        AdapterState(SPEC, {**received, "a": q.T @ received["a"], "b": received["b"] @ q})
        for q in (_orthogonal(seed) for seed in range(4))
    ]
    target = received["b"] @ received["a"]
    fedit = _result(create_aggregator("fedit"), turned)
    assert _missed(fedit, target) > 0.5 * np.linalg.norm(target)
    found = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        sent = [_rule(1, strength).finish(site, received) for site in turned]
        found.append(_missed(_result(create_aggregator("fedrot"), sent), target))
    assert found == sorted(found, reverse=True) and found[-1] < 1e-10 * np.linalg.norm(target)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_part_of_a_rotation_is_a_rotation_in_between(strength: float) -> None:
    for seed in range(20):
        overlap = np.random.default_rng(seed).standard_normal((RANK, RANK))
        turn, whole = rotation(overlap, strength), rotation(overlap, 1.0)
        np.testing.assert_allclose(turn.T @ turn, np.eye(RANK), atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1.0, abs=1e-10)
        # Nearest to the interpolation: no small rotation of it is nearer.
        aim = (1 - strength) * np.eye(RANK) + strength * whole
        for other in range(20):
            draw = 1e-3 * np.random.default_rng(other).standard_normal((RANK, RANK))
            skew = draw - draw.T
            near = turn @ np.linalg.solve(np.eye(RANK) - skew, np.eye(RANK) + skew)
            assert np.linalg.norm(near - aim) >= np.linalg.norm(turn - aim) - 1e-9
    theta = 1.2
    plane = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    got = rotation(plane, strength)
    angle = np.arctan2(strength * np.sin(theta), 1 - strength + strength * np.cos(theta))
    np.testing.assert_allclose(got, [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], atol=1e-12)


def test_a_reflection_is_no_rotation() -> None:
    mirror = np.diag([3.0, 2.0, -1.0])
    np.testing.assert_allclose(rotation(mirror, 1.0), np.eye(3), atol=1e-12)


def test_nothing_is_turned_to_a_zero_factor() -> None:
    trained, received = _drawn(7), _drawn(8)
    fresh = AdapterState(SPEC, {**received, "b": np.zeros((M, RANK))})
    assert _rule(2, 1.0).finish(trained, fresh) == trained


@pytest.mark.parametrize("policy", ["freeze", "local", "receive"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_factor_that_is_not_sent_keeps_the_other_as_it_is(policy: Any, name: str) -> None:
    spec = SPEC.with_policy(policy, lambda tensor: tensor.name == name)
    trained, received = _drawn(9, spec), _drawn(10, spec)
    assert _rule(1, 1.0).finish(trained, received) == trained
