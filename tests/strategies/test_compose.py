"""From a configuration to a run's aggregator: ranks by memory, tensor policies, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Capabilities
from fedgraft.strategies.compose import compose, refusal, secure_sum_refusal

SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("q.lora_A.w", (4, 6), role="lora_A"),
        TensorSpec("q.lora_B.w", (5, 4), role="lora_B"),
        TensorSpec("head", (3,), role="head"),
    ),
    (LowRankPair("q.lora_A.w", "q.lora_B.w", 2.0),),
    rank=4,
    alpha=8.0,
)


def _state(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(np.float32) for t in spec.tensors})


def _config(*sites: dict[str, Any], **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m",
        "privacy": {"enabled": False},
        "method": {"rank": 8},
        "data": {"sites": list(sites) or ["east", "west"]},
    }
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(values)


def test_a_site_has_its_own_rank_or_one_that_its_memory_allows() -> None:
    config = _config(
        {"name": "a", "rank": 3},
        {"name": "b", "memory": 16},
        {"name": "c", "memory": 8},
        {"name": "d", "memory": 7},
        {"name": "e", "memory": 0.1},
        {"name": "f"},
        {"name": "g", "memory": 8, "rank": 8},
    )
    assert config.ranks == {"a": 3, "b": 8, "c": 4, "d": 2, "e": 1, "f": 8, "g": 8}


ANY = Capabilities(heterogeneous_ranks=True)


@pytest.mark.parametrize(
    ("config", "can", "reason"),
    [
        (_config({"name": "a", "rank": 16}, {"name": "b"}), ANY, r"above method.rank 8; raise method.rank to 16"),
        (_config({"name": "a", "rank": 4}, {"name": "b"}), Capabilities(), "cannot mix ranks"),
        (
            _config({"name": "a", "rank": 4}, {"name": "b"}, **{"central.enabled": True}),
            ANY,
            "central privacy cannot mix ranks",
        ),
        (_config(**{"server.optimizer": "adam"}), Capabilities(resets_state=True), "means nothing"),
        (_config(**{"server.optimizer": "momentum"}), Capabilities(touches_base=True), "base weights"),
        (_config(**{"server.lr": 0.5}), Capabilities(touches_base=True), "base weights"),
        (_config(**{"server.optimizer": "yogi"}), Capabilities(needs_loss=True), "by their losses"),
        (_config(**{"central.enabled": True}), Capabilities(two_passes=True), "twice a round"),
        (_config(**{"server.upload": "int8"}), Capabilities(two_passes=True), "sketches"),
        (_config(**{"privacy.enabled": True}), Capabilities(needs_loss=True), "training loss"),
        (_config(), Capabilities(needs_validation=True), "server.validation"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_reason(config: RunConfig, can: Capabilities, reason: str) -> None:
    found = refusal(config, can)
    assert found is not None and reason in found and "\n" not in found


def test_what_can_go_together_is_not_refused() -> None:
    everything = Capabilities(linear_sum=True, heterogeneous_ranks=True, exact=True)
    mixed = _config({"name": "a", "rank": 4}, {"name": "b"}, **{"server.optimizer": "adam", "server.upload": "topk"})
    assert refusal(mixed, everything) is None


def test_a_rule_that_looks_at_single_updates_is_refused_under_a_secure_sum() -> None:
    assert secure_sum_refusal("fedit", Capabilities(linear_sum=True)) is None
    assert "single updates" in str(secure_sum_refusal("krum", Capabilities(needs_individual=True)))
    assert "add them up" in str(secure_sum_refusal("flora", Capabilities()))
    assert "twice a round" in str(secure_sum_refusal("fedask", Capabilities(linear_sum=True, two_passes=True)))


def test_patterns_make_tensors_personal_frozen_or_scheduled() -> None:
    policy = {"*lora_A*": "odd", "*lora_B*": "even", "head": "local"}
    aggregator = compose(_config(tensor_policy=policy))
    start = aggregator.prepare(_state(0))
    assert start.spec.select("share") == ("q.lora_A.w", "q.lora_B.w")
    assert start.spec.select("local") == ("head",)
    for number, shared, frozen in ((1, "q.lora_A.w", "q.lora_B.w"), (2, "q.lora_B.w", "q.lora_A.w")):
        aggregator.round = number
        sent = aggregator.for_site(start, "east")
        assert sent.spec.select("share") == (shared,) and sent.spec.select("freeze") == (frozen,)
        aggregator.start_round(start)
        given = _state(number, sent.spec).only([shared])
        aggregator.add(Update("east", given, 5.0))
        result = aggregator.result()
        assert list(result) == [shared]
        np.testing.assert_array_equal(result[shared], given[shared])


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora", "flora-na", "lora-fair"])
def test_a_schedule_that_keeps_one_factor_back_is_refused_before_the_run(name: str) -> None:
    aggregator = compose(_config(strategy=name, tensor_policy={"*lora_A*": "odd"}))
    with pytest.raises(UserError, match="lora_A"):
        aggregator.prepare(_state(0))


def test_the_first_pattern_that_fits_decides() -> None:
    aggregator = compose(_config(tensor_policy={"*lora_A*": "freeze", "*lora*": "local"}))
    spec = aggregator.prepare(_state(0)).spec
    assert spec.select("freeze") == ("q.lora_A.w",) and spec.select("local") == ("q.lora_B.w",)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    aggregator = compose(_config(tensor_policy={"*lora_C*": "freeze"}))
    with pytest.raises(UserError, match=r'no tensor of the adapter fits "\*lora_C\*"'):
        aggregator.prepare(_state(0))


def test_a_server_optimiser_stands_around_the_strategy() -> None:
    start, moved = _state(0), _state(1)
    for settings, factor in (({"server.lr": 0.5}, 0.5), ({}, 1.0)):
        aggregator = compose(_config(**settings))
        aggregator.round = 1
        aggregator.start_round(aggregator.prepare(start))
        aggregator.add(Update("east", moved, 2.0))
        result = aggregator.result()
        for name in start:
            np.testing.assert_allclose(result[name], start[name] + factor * (moved[name] - start[name]), atol=1e-6)
