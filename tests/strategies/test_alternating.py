"""RoLoRA and LA-LoRA: one factor trains at a time, by rounds or by steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Training, create_aggregator
from fedgraft.strategies.alternating import StepwiseAlternation, low_pass, resting_factors, with_factors_at_rest

PAIRS = (LowRankPair("q.a", "q.b", 2.0), LowRankPair("v.a", "v.b", 0.5, fan_in_fan_out=True))
SPEC = AdapterSpec(
    method="lora",
    tensors=(
        TensorSpec("q.a", (2, 9), role="lora_A", averaging="product"),
        TensorSpec("q.b", (6, 2), role="lora_B", averaging="product"),
        TensorSpec("v.a", (2, 4), role="lora_A", averaging="product"),
        TensorSpec("v.b", (3, 2), role="lora_B", averaging="product"),
        TensorSpec("head", (3,), role="head"),
    ),
    pairs=PAIRS,
    rank=2,
    alpha=4.0,
)
KINDS: list[Callable[[np.ndarray], Any]] = [np.array, torch.tensor]


def _state(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


@pytest.mark.parametrize("name", ["rolora", "lora-a2", "deer"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 17, 18])
def test_b_trains_in_odd_rounds_and_a_in_even_ones(name: str, number: int) -> None:
    rule = create_aggregator(name)
    prepared = rule.prepare(_state(0))
    assert prepared.spec.select("share") == SPEC.names, "what may leave a site at some time"
    rule.round = number
    sent = rule.for_site(prepared, "north")
    odd = number % 2 == 1
    assert sent.spec.select("freeze") == (("q.a", "v.a") if odd else ("q.b", "v.b"))
    assert sent.spec.select("share") == (("q.b", "v.b", "head") if odd else ("q.a", "v.a", "head"))
    # A newcomer is sent both factors.
    assert set(sent) == set(SPEC.names) and all(np.array_equal(sent[n], prepared[n]) for n in SPEC.names)


def test_what_the_configuration_froze_or_kept_local_is_not_given_back() -> None:
    policies = {"q.a": "local", "v.b": "freeze"}
    spec = SPEC
    for name, policy in policies.items():
        spec = spec.with_policy(policy, lambda t, name=name: t.name == name)  # type: ignore[arg-type,misc]
    for number in (1, 2, 3):
        found = with_factors_at_rest(_state(0, spec), number).spec
        assert found.by_name["q.a"].policy == "local" and found.by_name["v.b"].policy == "freeze"


def test_every_round_of_rolora_is_exact_given_the_factor_at_rest() -> None:
    rule = create_aggregator("rolora")
    state = rule.prepare(_state(0))
    weights = (1.0, 5.0, 0.25)
    for number in range(1, 7):
        rule.round = number
        rule.start_round(state)
        resting = resting_factors(SPEC, number)
        trained = []
        for site, weight in enumerate(weights):
            own = _state(100 * number + site)
            own = AdapterState(SPEC, {**own, **{name: state[name] for name in resting}})
            trained.append(own)
            sent = rule.for_site(state, str(site))
            update = own.with_spec(sent.spec).only(sent.spec.select("share"))
            assert not set(update) & resting
            rule.add(Update(str(site), update, weight))
        result = rule.result()
        after = AdapterState(SPEC, {**state, **result})
        for pair in PAIRS:
            true = sum(w * s.delta(pair) for w, s in zip(weights, trained, strict=True)) / sum(weights)
            assert np.abs(after.delta(pair) - true).max() <= 1e-6 * np.abs(true).max()
        assert all(np.array_equal(after[name], state[name]) for name in resting)
        state = after
    assert rule.capabilities.exact and rule.capabilities.linear_sum


def test_training_both_factors_in_a_round_would_not_be_exact() -> None:
    states = [_state(1), _state(2)]
    mean = (states[0] + states[1]) * 0.5
    true = (states[0].delta(PAIRS[0]) + states[1].delta(PAIRS[0])) / 2
    assert np.abs(mean.delta(PAIRS[0]) - true).max() > 0.1 * np.abs(true).max()
    assert not create_aggregator("la-lora").capabilities.exact


@pytest.mark.parametrize("name", ["rolora", "la-lora", "lora-a2", "deer", "fedsa"])
def test_a_method_without_factors_is_refused(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_aggregator(name).prepare(_state(0, AdapterSpec("bitfit", (TensorSpec("x", (3,)),))))
    assert str(refusal.value) == (
        f"strategy `{name}` works on the factors of a low-rank method; bitfit has none: choose lora"
    )


# LA-LoRA at the site


def _rule(private: bool = False, **options: Any) -> StepwiseAlternation:
    rule = create_aggregator("la-lora", options).local(Training("north", 1, 4, 0.1, private=private), {})
    assert isinstance(rule, StepwiseAlternation)
    return rule


def test_b_and_a_take_turns_step_by_step_with_the_head_in_all() -> None:
    rule = _rule()
    for step in range(6):
        names = rule.trains(SPEC, step)
        assert list(names) == (["q.a", "v.a", "head"] if step % 2 else ["q.b", "v.b", "head"])


def test_nothing_but_the_adapters_own_tensors_is_trained() -> None:
    spec = SPEC.with_extras([TensorSpec("control", (3,))])
    assert "control" not in [name for step in range(2) for name in _rule().trains(spec, step)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 2), (2, 9), (1, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_filter_is_a_convolution_with_the_border_repeated(
    kind: Callable[[np.ndarray], Any], shape: tuple[int, int], axis: int
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    before = matrix.copy()
    got = low_pass(kind(matrix), axis)
    assert type(got) is type(kind(matrix))
    kernel = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    want = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            for k in range(5):
                at = [i, j]
                at[axis] = min(max(at[axis] + k - 2, 0), shape[axis] - 1)
                want[i, j] += kernel[k] * before[at[0], at[1]]
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-15)
    assert np.array_equal(matrix, before), "the gradient itself is not touched"


def test_a_constant_passes_and_the_fastest_wave_does_not() -> None:
    row = np.ones((1, 20))
    np.testing.assert_allclose(low_pass(row, 1), row, atol=1e-15)
    wave = row * np.resize([1.0, -1.0], 20)
    assert np.abs(low_pass(wave, 1)[:, 2:-2]).max() <= 1e-15


def test_the_filter_leaves_70_256ths_of_the_noises_variance() -> None:
    noise = np.random.default_rng(0).standard_normal((400, 1000))
    variance = low_pass(noise, 1)[:, 2:-2].var()
    # 400,000 numbers, correlated over five: the standard error of the ratio is below half a percent.
    assert variance == pytest.approx(70 / 256, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "private", "filters"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"smooth": "always"}, False, True),
        ({"smooth": "never"}, True, False),
    ],
)
def test_factors_are_smoothed_along_their_wide_side_where_there_is_noise(
    kind: Callable[[np.ndarray], Any], options: dict[str, Any], private: bool, filters: bool
) -> None:
    rule = _rule(private, **options)
    state = _state(3)
    for step in range(2):
        for name in rule.trains(SPEC, step):
            gradient = kind(state[name])
            got = np.asarray(rule.direction(name, gradient, gradient, gradient, step))
            want = np.asarray(gradient)
            if filters and name != "head":
                want = low_pass(state[name], 1 if name.endswith(".a") else 0)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_alternating_steps_by_hand_are_those_of_the_rule() -> None:
    """Gradient descent on |s B A - T|^2, written out for one layer, against the rule in a loop over tensors."""
    random = np.random.default_rng(0)
    target, lr, s = random.standard_normal((6, 9)), 0.01, PAIRS[0].scaling
    start = _state(4)
    rule = _rule(True)
    values = {name: start[name].astype(np.float64) for name in ("q.a", "q.b")}
    b, a = values["q.b"].copy(), values["q.a"].copy()
    for step in range(4):
        gap = s * values["q.b"] @ values["q.a"] - target
        gradients = {"q.b": s * gap @ values["q.a"].T, "q.a": s * values["q.b"].T @ gap}
        for name in set(rule.trains(SPEC, step)) & set(values):
            values[name] = values[name] - lr * rule.direction(name, gradients[name], values[name], values[name], step)
    for _ in range(2):
        b = b - lr * low_pass(s * (s * b @ a - target) @ a.T, 0)
        a = a - lr * low_pass(s * b.T @ (s * b @ a - target), 1)
    np.testing.assert_allclose(values["q.b"], b, rtol=1e-12)
    np.testing.assert_allclose(values["q.a"], a, rtol=1e-12)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy_options\.smooth"):
        create_aggregator("la-lora", {"smooth": "sometimes"})


@pytest.mark.parametrize(
    ("name", "private"), [("rolora", False), ("la-lora", True), ("lora-a2", True), ("deer", False)]
)
@pytest.mark.slow
def test_a_whole_run_learns_by_turns(tiny_federation: Any, tmp_path: Path, name: str, private: bool) -> None:
    config = tiny_federation.private if private else tiny_federation.config
    run = tiny_federation.run(config(strategy=name, rounds=4), tmp_path)
    assert run["status"] == "finished" and run["rounds"] == 4
    assert run["loss"]["after"] < run["loss"]["before"]
