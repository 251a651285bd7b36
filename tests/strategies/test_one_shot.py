"""Mergers as strategies: what the command merges, at every site's own rank, from zero or from a trained start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator, strategies
from fedgraft.strategies.merging import Adapter, Context, create_merger
from fedgraft.strategies.one_shot import OneShot

NAMES = ("dare", "knots", "task-arithmetic", "ties", "uniform")
RANKS = {"east": 4, "north": 2, "south": 3}
PAIR = LowRankPair("lora_A", "lora_B", 2.0)


def spec_of(rank: int = 4) -> AdapterSpec:
    spec = AdapterSpec(
        "lora",
        (
            TensorSpec("lora_A", (4, 9), "float64", "lora_A", "product"),
            TensorSpec("lora_B", (8, 4), "float64", "lora_B", "product"),
            TensorSpec("head", (3, 5), "float64", "head"),
        ),
        (PAIR,),
        4,
        8.0,
    )
    return spec.with_rank(rank)


def state(seed: int, rank: int = 4) -> AdapterState:
    draw = np.random.default_rng(seed)
    return AdapterState(spec_of(rank), {t.name: draw.standard_normal(t.shape) for t in spec_of(rank).tensors})


def fresh() -> AdapterState:
    """As LoRA starts: B is zero."""
    return AdapterState(spec_of(), {**state(9), "lora_B": np.zeros((8, 4))})


def adapters() -> list[Adapter]:
    return [Adapter(name, state(i, rank), 10.0 + 20 * i) for i, (name, rank) in enumerate(RANKS.items())]


def round_of(name: str, start: AdapterState, number: int = 1, **options: Any) -> tuple[OneShot, AdapterState]:
    strategy = create_aggregator(name, options)
    assert isinstance(strategy, OneShot)
    strategy.round, strategy.ranks = number, RANKS
    strategy.start_round(start)
    for adapter in adapters():
        strategy.add(Update(adapter.name, adapter.state, adapter.weight))
    return strategy, strategy.result()


def dense(adapter: AdapterState) -> np.ndarray:
    return adapter.delta(adapter.spec.pairs[0])


def test_they_stand_among_the_strategies_as_the_rules_they_are() -> None:
    assert set(NAMES) <= set(strategies())
    for name in NAMES:
        cls, rule = strategies()[name], create_merger(name)
        assert (cls.summary, cls.equation, cls.source, cls.Options) == (
            rule.summary,
            rule.equation,
            rule.source,
            type(rule).Options,
        )
        can = cls.capabilities
        assert can.needs_individual and can.heterogeneous_ranks and can.resets_state
        assert not can.linear_sum and not can.exact


@pytest.mark.parametrize("name", NAMES)
def test_the_first_round_is_the_merger_of_the_sites_adapters(name: str) -> None:
    _, got = round_of(name, fresh())
    merged = create_merger(name).merge(adapters(), Context(spec_of(), seed=1))
    np.testing.assert_allclose(dense(got), dense(merged.state), atol=1e-12)
    np.testing.assert_allclose(got["head"], merged.state["head"], rtol=1e-14)
    assert got.spec == spec_of()


def test_a_later_round_merges_what_changed_since_it_began() -> None:
    """Task arithmetic: dW = dW_0 + lambda sum_k K p_k (dW_k - dW_0), cut to the rank."""
    start = state(7)
    _, got = round_of("task-arithmetic", start, 2, scale=0.2)
    p = np.array([x.weight for x in adapters()]) / sum(x.weight for x in adapters())
    whole = dense(start) + sum(
        0.2 * 3 * w * (dense(x.state) - dense(start)) for w, x in zip(p, adapters(), strict=True)
    )
    u, s, vt = np.linalg.svd(whole)
    np.testing.assert_allclose(dense(got), u[:, :4] * s[:4] @ vt[:4], atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_sites_that_did_not_move_leave_the_adapter_where_it_was(name: str) -> None:
    start = state(7)
    strategy = create_aggregator(name)
    strategy.ranks = {}
    strategy.start_round(start)
    for site in ("north", "south"):
        strategy.add(Update(site, start, 5.0))
    np.testing.assert_allclose(dense(strategy.result()), dense(start), atol=1e-12)


def test_a_site_receives_the_adapter_at_its_own_rank() -> None:
    strategy = create_aggregator("uniform")
    strategy.ranks = RANKS
    start = state(7)
    u, s, vt = np.linalg.svd(dense(start))
    for site, rank in RANKS.items():
        got = strategy.for_site(start, site)
        assert got.spec == spec_of(rank)
        np.testing.assert_allclose(dense(got), u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-10)
    assert strategy.for_site(start, "newcomer") is start


def test_the_round_says_who_got_which_weight() -> None:
    strategy, _ = round_of("uniform", fresh())
    assert strategy.merged is not None
    assert strategy.merged.weights == pytest.approx({"east": 1 / 9, "north": 3 / 9, "south": 5 / 9})
    assert set(strategy.merged.reasons) == set(RANKS)


def test_masks_of_dare_differ_from_round_to_round() -> None:
    first, again, later = (dense(round_of("dare", fresh(), number)[1]) for number in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, later)


def test_a_head_that_stays_at_the_sites_is_not_merged() -> None:
    local = spec_of().with_policy("local", lambda tensor: tensor.role == "head")
    start = state(7).with_spec(local)
    strategy = create_aggregator("ties")
    strategy.start_round(start)
    for seed, site in enumerate(("north", "south")):
        strategy.add(Update(site, state(seed).with_spec(local).only(["lora_A", "lora_B"]), 1.0))
    assert tuple(strategy.result()) == ("lora_A", "lora_B")


def test_a_factor_that_is_not_shared_is_refused() -> None:
    frozen = spec_of().with_policy("freeze", lambda tensor: tensor.name == "lora_A")
    with pytest.raises(UserError, match=r"strategy `knots` refactors.*lora_A is set to freeze: change tensor_policy"):
        create_aggregator("knots").start_round(state(7).with_spec(frozen))


def test_an_update_that_lacks_a_tensor_is_refused_by_site() -> None:
    strategy = create_aggregator("ties")
    strategy.start_round(fresh())
    with pytest.raises(UserError, match="site north: tensor head is missing"):
        strategy.add(Update("north", state(1).only(["lora_A", "lora_B"]), 1.0))


def test_a_round_without_updates_is_refused() -> None:
    strategy = create_aggregator("uniform")
    strategy.start_round(fresh())
    with pytest.raises(UserError, match="no update arrived"):
        strategy.result()


def test_ties_and_knots_warn_of_the_noise_of_privacy() -> None:
    for name in NAMES:
        strategy = create_aggregator(name)
        assert ("noise of differential privacy" in strategy.warning(True)) == (name in ("ties", "knots"))
        assert strategy.warning(False) == ""


@pytest.mark.slow
def test_a_whole_run_merges_sites_of_mixed_ranks(tiny_federation: Any, tmp_path: Any) -> None:
    ranks = [{"name": name, "rank": rank} for name, rank in RANKS.items()]
    config = tiny_federation.config(strategy="knots", rounds=1, **{"data.sites": ranks, "train.local_steps": 30})
    run = tiny_federation.run(config, tmp_path / "run")
    assert run["strategy"]["name"] == "knots" and run["rounds"] == 1
    assert run["accuracy"]["after"] > run["accuracy"]["before"] + 0.1
