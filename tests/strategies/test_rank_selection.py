"""LoRA-A2: a site keeps the ranks whose change of dW is largest, over all layers, and leaves the rest as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import LocalRule, Training, create_aggregator
from fedgraft.strategies.rank_selection import importance, most_important

PAIRS = (LowRankPair("q.a", "q.b", 2.0), LowRankPair("v.a", "v.b", 0.5, fan_in_fan_out=True))
SPEC = AdapterSpec(
    method="lora",
    tensors=(
        TensorSpec("q.a", (3, 9), "float64", "lora_A", "product"),
        TensorSpec("q.b", (6, 3), "float64", "lora_B", "product"),
        TensorSpec("v.a", (3, 4), "float64", "lora_A", "product"),
        TensorSpec("v.b", (5, 3), "float64", "lora_B", "product"),
        TensorSpec("head", (3,), "float64", "head"),
    ),
    pairs=PAIRS,
    rank=3,
    alpha=6.0,
)


def _state(seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape) for t in SPEC.tensors})


def _trained(received: AdapterState, seed: int) -> AdapterState:
    """What a site makes of it: every shared tensor moves."""
    moved = _state(seed)
    shared = received.spec.select("share")
    return AdapterState(received.spec, {n: received[n] + 0.3 * moved[n] * (n in shared) for n in received})


def _site(number: int, state: AdapterState, **options: Any) -> tuple[AdapterState, LocalRule]:
    aggregator = create_aggregator("lora-a2", options)
    aggregator.round = number
    rule = aggregator.local(Training("north", number, 3, 0.1), {})
    assert rule is not None
    return aggregator.for_site(aggregator.prepare(state), "north"), rule


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_counts_what_it_added_to_dw(number: int) -> None:
    received, _ = _site(number, _state(0))
    trained = _trained(received, 1)
    for at, pair in enumerate(PAIRS):
        got = importance(trained, received, at)
        for rank in range(3):
            new, old = (
                pair.scaling * np.outer(state[pair.b][:, rank], state[pair.a][rank]) for state in (trained, received)
            )
            assert got[rank] == pytest.approx(np.linalg.norm(new - old), rel=1e-12)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_the_most_important_ranks_of_all_layers_are_sent_and_the_others_go_back(number: int, budget: int) -> None:
    received, rule = _site(number, _state(0), budget=budget)
    trained = _trained(received, 1)
    sent = rule.finish(trained, received)
    assert sent.spec == received.spec
    # Naively: all (layer, rank) in one list, sorted.
    ranked = []
    for at in range(len(PAIRS)):
        ranked += [(float(value), at, rank) for rank, value in enumerate(importance(trained, received, at))]
    kept = {(at, rank) for _, at, rank in sorted(ranked, reverse=True)[: 2 * budget]}
    assert len(kept) == min(6, 2 * budget)
    for at, pair in enumerate(PAIRS):
        for rank in range(3):
            source = trained if (at, rank) in kept else received
            assert np.array_equal(sent[pair.a][rank], source[pair.a][rank])
            assert np.array_equal(sent[pair.b][:, rank], source[pair.b][:, rank])
    assert np.array_equal(sent["head"], trained["head"]), "the head is sent whole"


def test_layers_compete_so_that_one_may_send_all_and_another_none() -> None:
    received, rule = _site(1, _state(0), budget=1)
    change = {"q.b": np.zeros((6, 3)), "v.b": np.ones((5, 3))}
    change["q.b"][:, 1] = 1e-3
    trained = AdapterState(received.spec, {n: received[n] + change.get(n, 0.0) for n in received})
    sent = rule.finish(trained, received)
    assert np.array_equal(sent["q.b"], received["q.b"])
    assert int((sent["v.b"] != received["v.b"]).any(axis=0).sum()) == 2


def test_a_site_may_have_a_budget_of_its_own() -> None:
    for site, kept in (("north", 6), ("south", 2)):
        aggregator = create_aggregator("lora-a2", {"budget": 1, "budgets": {"north": 3}})
        aggregator.round = 1
        rule = aggregator.local(Training(site, 1, 3, 0.1), {})
        assert rule is not None
        received = aggregator.for_site(_state(0), site)
        sent = rule.finish(_trained(received, 1), received)
        moved = sum(int((sent[p.b] != received[p.b]).any(axis=0).sum()) for p in PAIRS)
        assert moved == kept


def test_the_mean_is_exact_for_what_the_sites_kept() -> None:
    aggregator = create_aggregator("lora-a2", {"budget": 1, "budgets": {"c": 2}})
    state = aggregator.prepare(_state(0))
    weights = {"a": 1.0, "b": 5.0, "c": 0.25}
    for number in (1, 2, 3):
        aggregator.round = number
        aggregator.start_round(state)
        own = {}
        for seed, (site, weight) in enumerate(weights.items()):
            rule = aggregator.local(Training(site, number, 3, 0.1), {})
            received = aggregator.for_site(state, site)
            assert rule is not None
            own[site] = rule.finish(_trained(received, 10 * number + seed), received)
            aggregator.add(Update(site, own[site].only(received.spec.select("share")), weight))
        state = AdapterState(SPEC, {**state, **aggregator.result()})
        for pair in PAIRS:
            true = sum(weights[site] * own[site].delta(pair) for site in weights) / sum(weights.values())
            np.testing.assert_allclose(state.delta(pair), true, rtol=1e-9, atol=1e-12)


def test_the_choice_is_a_function_of_what_was_received_and_the_noised_result_alone() -> None:
    """Post-processing: no gradient, loss or record goes in, and equal numbers give equal choices."""
    received, rule = _site(1, _state(0), budget=1)
    trained = _trained(received, 1)
    again = _site(1, _state(0), budget=1)[1]
    assert rule.finish(trained, received) == again.finish(trained, received)
    assert not rule.needs_loss


def test_of_equals_the_earlier_is_taken_and_none_twice() -> None:
    keep = most_important([np.array([1.0, 1.0]), np.array([1.0, 2.0])], 2)
    assert [part.tolist() for part in keep] == [[True, False], [False, True]]
    assert [part.tolist() for part in most_important([np.array([1.0])], 9)] == [[True]]
    assert most_important([], 3) == []


def test_a_budget_of_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy_options\.budget"):
        create_aggregator("lora-a2", {"budget": 0})
