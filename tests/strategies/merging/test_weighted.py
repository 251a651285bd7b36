"""Fisher and RegMean against loops over single numbers and the normal equations of dense layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError


def test_fisher_is_the_weighted_mean_of_each_number(zoo: Any, weights: Any) -> None:
    adapters = zoo.alike()
    need = zoo.every_need(adapters)
    merged = zoo.merge("fisher", adapters, context=need, floor=1e-30)
    p = weights(adapters)
    for name, array in merged.state.items():
        for at in np.ndindex(array.shape):
            terms = [
                (w * need["fisher"][x.name][name][at], x.state[name][at]) for w, x in zip(p, adapters, strict=True)
            ]
            assert array[at] == pytest.approx(sum(f * t for f, t in terms) / sum(f for f, _ in terms), rel=1e-9)
    mass = {x.name: w * sum(f.sum() for f in need["fisher"][x.name].values()) for w, x in zip(p, adapters, strict=True)}
    assert merged.weights == pytest.approx({n: m / sum(mass.values()) for n, m in mass.items()})


def test_another_scaling_is_folded_into_b_and_its_information(zoo: Any) -> None:
    """Fisher of B under scaling s is s^2 of that of s B, so the answer is the same however B is written."""
    adapters = zoo.alike()
    need = zoo.every_need(adapters)
    one = zoo.merge("fisher", adapters, context=need, floor=1e-30)
    odd = adapters[1].state
    spec = replace(odd.spec, pairs=tuple(replace(pair, scaling=4 * pair.scaling) for pair in odd.spec.pairs))
    scaled = {n: x / 4 if ".lora_B." in n else x for n, x in odd.items()}
    other = [adapters[0], replace(adapters[1], state=AdapterState(spec, scaled)), adapters[2]]
    fisher = need["fisher"]["south"]
    information = {n: x * 16 if ".lora_B." in n else x for n, x in fisher.items()}
    need["fisher"]["south"] = AdapterState(spec, information)
    two = zoo.merge("fisher", other, context=need, floor=1e-30)
    zoo.close(zoo.dense(one.state), zoo.dense(two.state), 1e-9)


def test_equal_information_is_the_mean_of_factors(zoo: Any) -> None:
    adapters = zoo.alike()
    flat = {x.name: x.state.map(lambda array: 0.3 + 0 * array) for x in adapters}
    merged = zoo.merge("fisher", adapters, context={"fisher": flat})
    zoo.close(zoo.dense(merged.state), zoo.dense(zoo.merge("uniform", adapters, on="factors").state))


def test_a_number_that_nobody_knows_of_is_averaged_plainly(zoo: Any) -> None:
    adapters = zoo.alike()
    need = zoo.every_need(adapters)
    name = "up.lora_A.default.weight"
    for own in need["fisher"]:
        state = need["fisher"][own]
        need["fisher"][own] = type(state)(state.spec, {**state, name: 0 * state[name]})
    merged = zoo.merge("fisher", adapters, context=need)
    p = {"north": 0.2, "south": 0.6, "west": 0.2}
    mean = sum(p[x.name] * x.state[name] for x in adapters)
    # The floor hangs on each adapter's mean information, and that is about the same.
    np.testing.assert_allclose(merged.state[name], mean, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda need: need["fisher"].pop("south"), "adapter south comes without Fisher information"),
        (
            lambda need: need["fisher"].update(south=need["fisher"]["south"] * -1.0),
            "adapter south: the Fisher information of up.lora_A.default.weight is negative",
        ),
        (
            lambda need: need["fisher"].update(south=need["fisher"]["south"] * 0.0),
            "adapter south: its Fisher information is zero everywhere",
        ),
    ],
)
def test_information_that_is_none_is_refused(change: Any, says: str, zoo: Any) -> None:
    adapters = zoo.alike()
    need = zoo.every_need(adapters)
    change(need)
    with pytest.raises(UserError) as refusal:
        zoo.merge("fisher", adapters, context=need)
    assert str(refusal.value).startswith(says)


def test_fisher_of_mixed_ranks_is_refused(zoo: Any) -> None:
    adapters = zoo.mixed()
    with pytest.raises(UserError, match=r"adapter north: has rank 2 at up.*needs one rank"):
        zoo.merge("fisher", adapters, context=zoo.every_need(adapters))


@pytest.mark.parametrize("shrink", [0.0, 0.9, 1.0])
def test_regmean_is_the_published_formula_on_dense_changes(shrink: float, zoo: Any, weights: Any) -> None:
    adapters = zoo.mixed()
    need = zoo.every_need(adapters)
    merged = zoo.merge("regmean", adapters, 9, context=need, shrink=shrink, ridge=1e-14)
    dense = [zoo.dense(x.state) for x in adapters]
    want = {}
    for layer in dense[0]:
        grams = []
        for p, x in zip(weights(adapters), adapters, strict=True):
            gram = need["grams"][x.name][f"{layer}.lora_A.default.weight"]
            grams.append(p * (shrink * gram + (1 - shrink) * np.diag(np.diag(gram))))
        want[layer] = sum(d[layer] @ g for d, g in zip(dense, grams, strict=True)) @ np.linalg.inv(sum(grams))
    zoo.close(zoo.dense(merged.state), want, 1e-8)
    assert merged.lost < 1e-7
    assert sum(merged.weights.values()) == pytest.approx(1.0)


def test_regmean_changes_the_layers_outputs_least(zoo: Any, weights: Any) -> None:
    """Without shrinking it is the least squares solution: no nearby change does better."""
    adapters = zoo.mixed()
    draw = np.random.default_rng(5)
    inputs = {x.name: draw.standard_normal((40, 7)) @ np.diag(draw.uniform(0.1, 3, 7)) for x in adapters}
    need = zoo.every_need(adapters)
    for name, x in inputs.items():
        need["grams"][name]["up.lora_A.default.weight"] = x.T @ x
    best = zoo.dense(zoo.merge("regmean", adapters, 9, context=need, shrink=1.0, ridge=1e-14).state)["up"]

    def error(w: np.ndarray) -> float:
        parts = zip(weights(adapters), adapters, strict=True)
        return sum(p * np.sum((inputs[x.name] @ (w - zoo.dense(x.state)["up"]).T) ** 2) for p, x in parts)

    mean = zoo.dense(zoo.merge("uniform", adapters, 9).state)["up"]
    assert error(best) < 0.98 * error(mean)
    assert all(error(best) <= error(best + 1e-3 * draw.standard_normal(best.shape)) for _ in range(50))


def test_equal_inputs_give_the_weighted_mean(zoo: Any) -> None:
    adapters = zoo.mixed()
    need = zoo.every_need(adapters)
    grams = {x.name: need["grams"]["north"] for x in adapters}
    merged = zoo.merge("regmean", adapters, 9, context={"grams": grams})
    zoo.close(zoo.dense(merged.state), zoo.dense(zoo.merge("uniform", adapters, 9).state), 1e-9)


def test_an_input_that_is_always_zero_is_averaged_plainly(zoo: Any) -> None:
    adapters = zoo.mixed()
    need = zoo.every_need(adapters)
    for grams in need["grams"].values():
        gram = grams["up.lora_A.default.weight"]
        gram[2, :] = gram[:, 2] = 0.0
    merged = zoo.merge("regmean", adapters, 9, context=need)
    mean = zoo.dense(zoo.merge("uniform", adapters, 9).state)["up"]
    # The ridge is a share of each adapter's own mean, about the same for all.
    np.testing.assert_allclose(zoo.dense(merged.state)["up"][:, 2], mean[:, 2], atol=0.05 * np.abs(mean).max())


@pytest.mark.parametrize(
    ("gram", "says"),
    [
        (None, "comes without the Gram matrix of the inputs of up.lora_A.default.weight"),
        (np.eye(6), "the Gram matrix of up.lora_A.default.weight is not 7 x 7"),
        (np.full((7, 7), np.nan), "the Gram matrix of up.lora_A.default.weight is not 7 x 7 finite numbers"),
        (np.zeros((7, 7)), "has no positive diagonal"),
        (-np.eye(7), "has no positive diagonal"),
    ],
)
def test_a_gram_matrix_that_is_none_is_refused(gram: Any, says: str, zoo: Any) -> None:
    adapters = zoo.mixed()
    need = zoo.every_need(adapters)
    need["grams"]["south"]["up.lora_A.default.weight"] = gram
    with pytest.raises(UserError) as refusal:
        zoo.merge("regmean", adapters, context=need)
    assert "adapter south" in str(refusal.value) and says in str(refusal.value)
