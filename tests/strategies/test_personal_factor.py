"""FedSA: A is averaged, each site keeps its own B and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator

PAIR = LowRankPair("q.a", "q.b", 2.0)
SPEC = AdapterSpec(
    method="lora",
    tensors=(
        TensorSpec("q.a", (2, 9), role="lora_A", averaging="product"),
        TensorSpec("q.b", (6, 2), role="lora_B", averaging="product"),
        TensorSpec("bias", (6,), role="bias"),
        TensorSpec("head", (3,), role="head"),
    ),
    pairs=(PAIR,),
    rank=2,
)


def _state(seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in SPEC.tensors})


def test_a_and_what_is_no_factor_are_shared_b_and_the_head_are_not() -> None:
    prepared = create_aggregator("fedsa").prepare(_state(0))
    assert prepared.spec.select("share") == ("q.a", "bias")
    assert prepared.spec.select("local") == ("q.b", "head")
    assert all(np.array_equal(prepared[name], _state(0)[name]) for name in SPEC.names)


def test_a_is_the_weighted_mean() -> None:
    rule = create_aggregator("fedsa")
    start = rule.prepare(_state(0))
    rule.start_round(start)
    states, weights = [_state(seed) for seed in (1, 2, 3)], (1.0, 5.0, 0.25)
    for site, (state, weight) in enumerate(zip(states, weights, strict=True)):
        rule.add(Update(str(site), state.with_spec(start.spec).only(("q.a", "bias")), weight))
    result = rule.result()
    assert tuple(result) == ("q.a", "bias")
    want = sum(w * s["q.a"].astype(np.float64) for w, s in zip(weights, states, strict=True)) / sum(weights)
    np.testing.assert_allclose(result["q.a"], want, rtol=1e-6)


def test_no_sites_dw_is_claimed_to_be_the_mean() -> None:
    can = create_aggregator("fedsa").capabilities
    assert can.linear_sum and not can.exact


def test_a_method_of_nothing_but_factors_of_ones_own_is_refused() -> None:
    spec = AdapterSpec("lora", SPEC.tensors[:2], (PAIR,), rank=2).with_policy("freeze", lambda t: t.name == "q.a")
    state = AdapterState(spec, {name: _state(0)[name] for name in ("q.a", "q.b")})
    with pytest.raises(UserError, match="strategy `fedsa` keeps B at each site"):
        create_aggregator("fedsa").prepare(state)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.slow
def test_a_whole_run_sends_less_than_half(tiny_federation: Any, tmp_path: Path, private: bool) -> None:
    make = tiny_federation.private if private else tiny_federation.config
    run, plain = (tiny_federation.run(make(strategy=name, rounds=2), tmp_path / name) for name in ("fedsa", "fedit"))
    assert run["status"] == "finished"
    assert run["adapter"]["shared"] < 0.5 * plain["adapter"]["shared"]
    assert run["bytes_up"] < 0.8 * plain["bytes_up"], "the rest is what every message carries"
