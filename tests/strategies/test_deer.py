"""DEeR: the factor at rest is orthonormal, so that noise on the other keeps its size in dW, and dW is the mean."""

from __future__ import annotations

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.alternating import resting_factors
from fedgraft.strategies.deer import regauged

PAIRS = (LowRankPair("q.a", "q.b", 2.0), LowRankPair("v.a", "v.b", 0.5, fan_in_fan_out=True))
SPEC = AdapterSpec(
    method="lora",
    tensors=(
        TensorSpec("q.a", (3, 9), "float64", "lora_A", "product"),
        TensorSpec("q.b", (6, 3), "float64", "lora_B", "product"),
        TensorSpec("v.a", (3, 4), "float64", "lora_A", "product"),
        TensorSpec("v.b", (3, 3), "float64", "lora_B", "product"),
        TensorSpec("head", (3,), "float64", "head"),
    ),
    pairs=PAIRS,
    rank=3,
    alpha=6.0,
)


def _state(seed: int, scale: float = 1.0) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: scale * random.standard_normal(t.shape) for t in SPEC.tensors})


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_factor_at_rest_becomes_orthonormal_and_dw_stays(number: int, scale: float) -> None:
    state = _state(0, scale)
    got = regauged(state, number)
    for pair in PAIRS:
        rows = got[pair.a] if number % 2 else got[pair.b].T
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-12)
        want = state.delta(pair)
        assert np.abs(got.delta(pair) - want).max() <= 1e-12 * np.abs(want).max()
    assert np.array_equal(got["head"], state["head"])


def test_a_factor_of_zero_keeps_the_other_trainable() -> None:
    fresh = AdapterState(SPEC, {**_state(0), "q.b": np.zeros((6, 3)), "v.b": np.zeros((3, 3))})
    for number in (1, 2, 3):
        fresh = regauged(fresh, number)
        for pair in PAIRS:
            rows = fresh[pair.a] if number % 2 else fresh[pair.b].T
            np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-12)
            assert not fresh.delta(pair).any()


def test_the_gauge_is_a_function_of_the_state_alone() -> None:
    """Signs that a routine is free to choose are settled, and an orthonormal factor stays as it is."""
    once = regauged(_state(0), 1)
    twice = regauged(once, 1)
    assert all(np.allclose(once[name], twice[name], atol=1e-12) for name in SPEC.names)
    flipped = AdapterState(SPEC, {**_state(0), "q.a": -_state(0)["q.a"], "q.b": -_state(0)["q.b"]})
    for pair in PAIRS[:1]:
        np.testing.assert_allclose(regauged(flipped, 1).delta(pair), once.delta(pair), atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_noise_reaches_dw_as_the_papers_regulator_has_it(scale: float) -> None:
    """The same W gives the paper's noise W A^T (A A^T)^-1 on B, and ours W Q^T on the turned B: equal in dW."""
    state = _state(0, scale)
    got = regauged(state, 1)
    random = np.random.default_rng(1)
    for pair in PAIRS:
        a, q = state[pair.a], got[pair.a]
        noise = random.standard_normal((len(state[pair.b]), a.shape[1]))
        theirs = (noise @ a.T @ np.linalg.inv(a @ a.T)) @ a
        ours = (noise @ q.T) @ q
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
        projection = np.linalg.pinv(a) @ a
        np.testing.assert_allclose(ours, noise @ projection, atol=1e-9)


def test_the_noise_of_dw_does_not_hang_on_the_size_of_the_factors_as_that_of_rolora_does() -> None:
    """E |noise of dW|^2 = s^2 sigma^2 m r in any gauge's size; without the regulator it is s^2 sigma^2 m |A|^2."""
    sigma, draws = 0.7, 4000
    random = np.random.default_rng(2)
    for scale in (0.1, 10.0):
        state = _state(0, scale)
        pair = PAIRS[0]
        noise = sigma * random.standard_normal((draws, 6, 3))
        ours = pair.scaling * noise @ regauged(state, 1)[pair.a]
        plain = pair.scaling * noise @ state[pair.a]
        # Chi-square with 18 degrees of freedom a draw: 4000 draws give 0.5 % standard error.
        want = pair.scaling**2 * sigma**2 * 6 * 3
        assert np.mean(np.sum(ours**2, axis=(1, 2))) == pytest.approx(want, rel=0.03)
        size = np.sum(state[pair.a] ** 2)
        bound = pair.scaling**2 * sigma**2 * 6 * size
        assert np.mean(np.sum(plain**2, axis=(1, 2))) == pytest.approx(bound, rel=0.03)


def test_the_published_noise_would_hide_less_than_the_clipping_allows() -> None:
    """What the docstring says of the published code: in the noise's own metric a clipped change measures |dB A|."""
    random = np.random.default_rng(3)
    a = 5.0 * np.linalg.qr(random.standard_normal((9, 3)))[0].T
    change = random.standard_normal((6, 3))
    change /= np.linalg.norm(change)
    covariance = np.linalg.inv(a @ a.T)
    # Rows of W A^T (A A^T)^-1 have that covariance: the squared Mahalanobis length, row by row.
    mahalanobis = np.sqrt(sum(row @ np.linalg.inv(covariance) @ row for row in change))
    assert mahalanobis == pytest.approx(np.linalg.norm(change @ a), rel=1e-9)
    assert mahalanobis == pytest.approx(5.0), "five times what a clip of 1 promises"


def test_every_round_is_exact_and_ready_for_the_next() -> None:
    rule = create_aggregator("deer")
    state = rule.prepare(_state(0))
    weights = (1.0, 5.0, 0.25)
    for number in range(1, 7):
        rule.round = number
        rule.start_round(state)
        resting = resting_factors(SPEC, number)
        trained = []
        for site, weight in enumerate(weights):
            own = AdapterState(SPEC, {**_state(100 * number + site), **{name: state[name] for name in resting}})
            trained.append(own)
            sent = rule.for_site(state, str(site))
            rule.add(Update(str(site), own.with_spec(sent.spec).only(sent.spec.select("share")), weight))
        state = rule.result()
        assert set(state) == set(SPEC.names), "both factors change"
        for pair in PAIRS:
            true = sum(w * s.delta(pair) for w, s in zip(weights, trained, strict=True)) / sum(weights)
            assert np.abs(state.delta(pair) - true).max() <= 1e-9 * np.abs(true).max()
            rows = state[pair.a] if number % 2 == 0 else state[pair.b].T
            np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-12)
    assert rule.capabilities.exact and rule.capabilities.linear_sum and rule.capabilities.resets_state


def test_pairs_that_are_not_all_shared_keep_their_factors() -> None:
    """A site's own factor would not turn with the other."""
    spec = SPEC.with_policy("local", lambda t: t.name == "q.b").with_policy("freeze", lambda t: t.name == "v.a")
    state = _state(0).with_spec(spec)
    assert regauged(state, 1) == state and regauged(state, 2) == state


def test_a_rank_that_cannot_be_orthonormal_is_refused_by_name() -> None:
    tensors = (TensorSpec("q.a", (5, 9)), TensorSpec("q.b", (4, 5)))
    spec = AdapterSpec("lora", tensors, (LowRankPair("q.a", "q.b", 1.0),), rank=5)
    state = AdapterState(spec, {t.name: np.ones(t.shape, dtype="float32") for t in tensors})
    with pytest.raises(UserError, match=r"rank 5 cannot be on the side of 4 of the pair q\.a; lower method\.rank"):
        regauged(state, 2)
