"""IFCA against the published algorithm, and what it needs to be told, to keep and to refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.server.checkpoints import Checkpoint, load_last, save
from fedgraft.strategies import Training, create_aggregator
from fedgraft.strategies.clustered import CHOICE, of_cluster


def two_kinds(play: Any) -> list[Any]:
    """Four sites of two kinds: p and q want one thing, r and s another."""
    return [play.site(name, 50 + k // 2, weight=float(1 + k), steps=5, lr=0.2) for k, name in enumerate("pqrs")]


def clusters_of(rule: Any) -> list[AdapterState]:
    return [state for name, state in sorted(rule.memory().items()) if name.startswith("cluster-")]


@pytest.mark.parametrize("dealt", [0, 1, 2])
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_three_rounds_are_the_published_algorithm_after_those_that_are_dealt(
    toy: Callable[..., Any], clusters: int, dealt: int
) -> None:
    rule = create_aggregator("ifca", {"clusters": clusters, "spread": 1.0, "dealt": dealt})
    play = toy(rule)
    play.sites = two_kinds(play)
    now = play.draw(0)
    rule.ranks = {}
    sent = rule.for_site(now, "p")
    models = [{name: sent[of_cluster(name, j)] for name in now} for j in range(clusters)]
    assert all(np.array_equal(models[0][name], now[name]) for name in now), "the first begins as the run's adapter"
    for number in (1, 2, 3):
        now = play.one(now)
        sums: list[dict[str, np.ndarray]] = [dict.fromkeys(now, np.zeros(())) for _ in models]
        weights, chosen = [0.0] * clusters, {}
        for k, site in enumerate(play.sites):
            losses = [site.loss(AdapterState(play.spec, model)) for model in models]
            best = int(np.argmin(losses))
            j = chosen[site.name] = k % clusters if number <= dealt else best
            weights[j] += site.weight
            for name in now:
                y = models[j][name]
                for step in range(site.steps):
                    y = y - site.lr * site.gradient(name, y, number, step)
                sums[j][name] = sums[j][name] + site.weight * y
        models = [
            {name: sums[j][name] / weights[j] for name in now} if weights[j] else models[j] for j in range(clusters)
        ]
        for got, want in zip(clusters_of(rule), models, strict=True):
            for name in now:
                np.testing.assert_allclose(got[name], want[name], rtol=1e-13, atol=1e-14)
        heaviest = models[int(np.argmax(weights))]
        assert all(np.allclose(now[name], heaviest[name], rtol=1e-13) for name in now)
        for update in play.sent:
            assert int(np.argmax(update.state[CHOICE])) == chosen[update.site]


def test_sites_of_one_kind_find_each_other_and_fit_better_than_one_model_for_all(toy: Callable[..., Any]) -> None:
    losses = {}
    for name, options in (("fedit", {}), ("ifca", {"clusters": 2})):
        play = toy(create_aggregator(name, options))
        play.sites = two_kinds(play)
        *_, end = play.rounds(play.draw(0), 10)
        if name == "ifca":
            chosen = {u.site: int(np.argmax(u.state[CHOICE])) for u in play.sent}
            assert chosen["p"] == chosen["q"] != chosen["r"] == chosen["s"]
        received = {site.name: play.rule.for_site(end, site.name) for site in play.sites}
        losses[name] = sum(site.loss(received[site.name]) for site in play.sites)
    assert losses["ifca"] < 0.1 * losses["fedit"]


def test_clusters_that_would_stay_alike_are_refused() -> None:
    with pytest.raises(UserError, match="clusters that begin alike stay alike"):
        create_aggregator("ifca", {"clusters": 2, "dealt": 0})


def test_as_published_all_may_choose_one_which_dealing_prevents(toy: Callable[..., Any]) -> None:
    """Why sites are dealt at first: of eight seeds most end with all sites in one cluster."""
    apart = {0: 0, 1: 0}
    for dealt in apart:
        for seed in range(8):
            options = {"clusters": 2, "dealt": dealt, "spread": 1.0 if not dealt else 0.1, "seed": seed}
            play = toy(create_aggregator("ifca", options))
            play.sites = two_kinds(play)
            *_, _ = play.rounds(play.draw(0), 5)
            chosen = {u.site: int(np.argmax(u.state[CHOICE])) for u in play.sent}
            apart[dealt] += chosen["p"] == chosen["q"] != chosen["r"] == chosen["s"]
    assert apart[0] <= 4 < 8 == apart[1]


def test_a_site_that_is_evaluated_gets_the_cluster_that_it_trained_last(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("ifca", {"clusters": 2}))
    play.sites = two_kinds(play)
    *_, end = play.rounds(play.draw(0), 4)
    models = clusters_of(play.rule)
    for update in play.sent:
        own = models[int(np.argmax(update.state[CHOICE]))]
        received = play.rule.for_site(end, update.site)
        assert all(np.array_equal(received[name], own[name]) for name in own)
    stranger = play.rule.for_site(end, "new")
    assert all(np.array_equal(stranger[name], end[name]) for name in end)


def test_a_factor_that_begins_at_zero_is_spread_too(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("ifca", {"clusters": 3, "spread": 0.2})
    start = toy(rule).draw(0)
    start = AdapterState(start.spec, {**start, "b": np.zeros((3, 2))})
    sent = rule.for_site(start, "p")
    second, third = (sent[of_cluster("b", j)] for j in (1, 2))
    assert np.abs(second).max() > 0 and not np.allclose(second, third)


def test_ties_are_dealt_among_the_sites_and_always_alike(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("ifca", {"clusters": 2, "dealt": 0, "spread": 0.1})
    sent = rule.for_site(toy(rule).draw(0), "p")
    chosen: dict[str, int] = {}
    for number in range(20):
        for _ in range(2):
            site = f"site-{number}"
            local = rule.local(Training(site, 1, 1, 0.1), {})
            assert local is not None
            local.begin(sent, lambda state: 1.0)
            choice = int(np.argmax(local.finish(sent, sent)[CHOICE]))
            assert chosen.setdefault(site, choice) == choice
    assert set(chosen.values()) == {0, 1}


def test_a_loss_that_is_no_number_is_never_the_least(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("ifca", {"clusters": 2, "dealt": 0, "spread": 0.1})
    sent = rule.for_site(toy(rule).draw(0), "p")
    local = rule.local(Training("p", 1, 1, 0.1), {})
    assert local is not None
    losses = iter([np.nan, 5.0])
    local.begin(sent, lambda state: next(losses))
    assert int(np.argmax(local.finish(sent, sent)[CHOICE])) == 1
    with pytest.raises(UserError, match="site p: no cluster's adapter has a finite training loss"):
        local.begin(sent, lambda state: float("nan"))
    with pytest.raises(UserError, match="chooses by the training loss, which is not told"):
        local.begin(sent, None)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(toy: Callable[..., Any], tmp_path: Path) -> None:
    options = {"clusters": 2, "spread": 1.0}
    whole, broken = (toy(create_aggregator("ifca", options)) for _ in range(2))
    *_, want = whole.rounds(whole.draw(0), 3)
    *_, now = broken.rounds(broken.draw(0), 2)
    save(tmp_path, Checkpoint(2, now, broken.rule.memory()), "digest", keep=1)
    held = load_last(tmp_path)
    broken.rule = create_aggregator("ifca", options)
    broken.rule.recall(held.memory)
    assert [s.digest for s in broken.rule.memory().values()] == [s.digest for s in held.memory.values()]
    assert broken.rule.for_site(held.state, "p") == broken.rule.for_site(now, "p")
    assert broken.one(held.state) == want


def test_a_checkpoint_of_other_clusters_is_refused(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("ifca", {"clusters": 2}))
    play.one(play.draw(0))
    with pytest.raises(UserError, match="the checkpoint holds 2 clusters, the strategy has 3"):
        create_aggregator("ifca", {"clusters": 3}).recall(play.rule.memory())


@pytest.mark.parametrize("told", [[0.0, 0.0], [1.0, 0.9], [np.nan, 1.0], [-1.0, -3.0]])
def test_a_site_that_does_not_say_which_cluster_it_trained_is_refused(
    toy: Callable[..., Any], told: list[float]
) -> None:
    rule = create_aggregator("ifca", {"clusters": 2})
    start = toy(rule).draw(0)
    rule.start_round(start)
    sent = rule.for_site(start, "p")
    bad = AdapterState(sent.spec, {**sent, CHOICE: np.array(told, np.float32)}).only(sent.spec.select("share"))
    with pytest.raises(UserError, match="p: does not say which one of 2 clusters"):
        rule.add(Update("p", bad, 1.0))
    with pytest.raises(UserError, match="no update arrived"):
        rule.result()


@pytest.mark.slow
def test_a_whole_run_chooses_trains_and_evaluates(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(strategy="ifca", strategy_options={"clusters": 2})
    run = tiny_federation.run(config, tmp_path / "run")
    plain = tiny_federation.run(tiny_federation.config(), tmp_path / "plain")
    assert run["status"] == "finished" and run["accuracy"]["after"] > run["accuracy"]["before"]
    assert run["bytes_down"] > 2 * plain["bytes_down"] and run["bytes_up"] < run["bytes_down"] / 2


def test_choosing_by_the_loss_is_refused_under_privacy(tiny_federation: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by its training loss"):
        tiny_federation.run(tiny_federation.private(strategy="ifca"), tmp_path / "run")
