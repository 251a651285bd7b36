"""SCAFFOLD against the published algorithm, with what a site must remember and the server must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState
from fedgraft.core.update import Update
from fedgraft.server.checkpoints import Checkpoint, load_last, save
from fedgraft.strategies import Training, create_aggregator
from fedgraft.strategies.scaffold import control


def published(
    toy: Any, start: AdapterState, rounds: int, weights: Sequence[float], asked: Sequence[Sequence[str]] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Algorithm 1 of Karimireddy et al. with option II; ``weights`` equal: as printed. Gives x, c and the c_i."""
    sites = sorted(toy.sites, key=lambda site: site.name)
    zero = {name: np.zeros(array.shape) for name, array in start.items()}
    x, c = dict(start), dict(zero)
    own = {site.name: dict(zero) for site in sites}
    for number in range(1, rounds + 1):
        here = [(s, w) for s, w in zip(sites, weights, strict=True) if not asked or s.name in asked[number - 1]]
        total = sum(w for _, w in here)
        moved, changed = dict(zero), dict(zero)
        for site, weight in here:
            for name in x:
                y = x[name]
                for step in range(site.steps):
                    y = y - site.lr * (site.gradient(name, y, number, step) - own[site.name][name] + c[name])
                new = own[site.name][name] - c[name] + (x[name] - y) / (site.steps * site.lr)
                moved[name] = moved[name] + weight / total * (y - x[name])
                changed[name] = changed[name] + weight / total * (new - own[site.name][name])
                own[site.name][name] = new
        x = {name: x[name] + moved[name] for name in x}
        c = {name: c[name] + len(here) / len(sites) * changed[name] for name in c}
    return x, c, own


def close(got: Any, want: Any) -> None:
    # A division by K eta and back: a few hundred roundings of numbers near 1.
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("equal", [True, False])
def test_three_rounds_are_the_published_algorithm(toy: Callable[..., Any], equal: bool) -> None:
    play = toy(create_aggregator("scaffold"), steps=4)
    if equal:
        play.sites = [play.site(site.name, site.seed, steps=4) for site in play.sites]
    start = play.draw(0)
    *_, got = play.rounds(start, 3)
    x, c, own = published(play, start, 3, [site.weight for site in play.sites])
    for name in start:
        close(got[name], x[name])
        close(play.rule.memory()["control"][name], c[name])
        for site in play.sites:
            close(play.memories[site.name]["control"][control(name)], own[site.name][name])


def test_the_common_variate_is_the_mean_of_the_sites_so_that_corrections_cancel(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("scaffold"))
    play.one(play.one(play.draw(0)))
    weights = np.array([site.weight for site in play.sites]) / sum(site.weight for site in play.sites)
    for name in play.spec.names:
        own = [play.memories[site.name]["control"][control(name)] for site in play.sites]
        mean = sum(p * c for p, c in zip(weights, own, strict=True))
        close(play.rule.memory()["control"][name], mean)
        assert max(float(np.abs(c - mean).max()) for c in own) > 0.1, "the sites do drift"


def test_sites_that_rest_keep_their_variate_and_the_common_one_moves_by_their_share(toy: Callable[..., Any]) -> None:
    class Resting(type(create_aggregator("scaffold"))):  # type: ignore[misc]
        name = "resting"

        def asked(self, sites: Sequence[str]) -> Sequence[str]:
            return sites if self.round == 1 else sites[: self.round - 1]

    play = toy(Resting(), steps=2)
    play.sites = [play.site(site.name, site.seed, steps=2) for site in play.sites]
    start = play.draw(0)
    *_, got = play.rounds(start, 3)
    x, c, _ = published(play, start, 3, [1.0, 1.0, 1.0], asked=["pqr", "p", "pq"])
    for name in start:
        close(got[name], x[name])
        close(play.rule.memory()["control"][name], c[name])


def test_it_takes_the_drift_out(toy: Callable[..., Any]) -> None:
    """What it is for: with many local steps FedAvg ends away from the optimum of the mean loss, SCAFFOLD at it."""
    ends = {}
    for name in ("fedit", "scaffold"):
        play = toy(create_aggregator(name))
        play.sites = [play.site(s.name, s.seed, steps=8, lr=0.1, noise=0.0) for s in play.sites]
        *_, end = play.rounds(play.draw(0), 60)
        curves = [site.curve("a", (2, 3)) for site in play.sites]
        best = sum(h * t for h, t in curves) / sum(h for h, _ in curves)
        ends[name] = float(np.abs(end["a"] - best).max())
    assert ends["scaffold"] < 1e-6 < 0.01 < ends["fedit"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_option_two_holds_for_plain_sgd_and_the_mean_gradient_for_all(toy: Callable[..., Any], momentum: float) -> None:
    play = toy(create_aggregator("scaffold"), steps=5, momentum=momentum)
    start = play.draw(0)
    play.one(start)
    for site, update in zip(play.sites, play.sent, strict=True):
        for name in start:
            option_two = (start[name] - update.state[name]) / (site.steps * site.lr)
            got = play.memories[site.name]["control"][control(name)]
            if momentum == 0:
                close(got, option_two)
            else:
                assert np.abs(option_two).max() > 1.5 * np.abs(got).max(), "momentum would be counted as gradient"


def test_what_is_sent_beside_the_adapter_is_a_function_of_it_and_of_what_came_down(toy: Callable[..., Any]) -> None:
    """Under plain SGD: u = (x - y) / (K eta). Whoever sees y and x can work u out, so it tells nothing more."""
    play = toy(create_aggregator("scaffold"), steps=3)
    now = play.draw(0)
    for _ in range(3):
        before, now = now, play.one(now)
        for site, update in zip(play.sites, play.sent, strict=True):
            for name in before:
                close(update.state[control(name)], (before[name] - update.state[name]) / (site.steps * site.lr))


def test_noise_in_the_variates_cancels_in_the_mean(toy: Callable[..., Any]) -> None:
    """Gradients that are noise alone: a site goes further astray than without variates, the mean does not."""
    plays = [toy(create_aggregator(name), steps=4) for name in ("scaffold", "fedit")]

    class Noise(plays[0].site):  # type: ignore[misc]
        def gradient(self, name: str, value: np.ndarray, round: int, step: int) -> np.ndarray:
            _, optimum = self.curve(name, value.shape)
            return super().gradient(name, optimum, round, step)

    spread = []
    for play in plays:
        play.sites = [Noise(site.name, site.seed, site.weight, steps=4) for site in play.sites]
        now, squares = play.draw(0), 0.0
        for number in range(40):
            before, now = now, play.one(now)
            if number:
                squares += sum(float(((u.state["a"] - before["a"]) ** 2).sum()) for u in play.sent)
        spread.append((now, squares))
    (scaffold, own), (fedit, plain) = spread
    for name in fedit:
        close(scaffold[name], fedit[name])
    assert 1.5 * plain < own < 3 * plain


def test_no_site_drifts_alone_so_one_site_is_the_identity(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("scaffold"))
    play.sites = play.sites[:1]
    now = play.draw(0)
    for _ in range(3):
        now = play.one(now)
        assert all(np.allclose(now[name], play.sent[0].state[name], rtol=1e-15) for name in now)
    plain = toy(create_aggregator("fedit"))
    plain.sites = play.sites
    *_, want = plain.rounds(plain.draw(0), 3)
    for name in now:
        close(now[name], want[name])


def test_a_stopped_run_goes_on_as_if_it_had_not_been(toy: Callable[..., Any], tmp_path: Path) -> None:
    whole, broken = toy(create_aggregator("scaffold")), toy(create_aggregator("scaffold"))
    *_, want = whole.rounds(whole.draw(0), 2)
    now = broken.one(broken.draw(0))
    save(tmp_path, Checkpoint(1, now, broken.rule.memory()), "digest", keep=1)
    held = load_last(tmp_path)
    broken.rule = create_aggregator("scaffold")
    broken.rule.recall(held.memory)
    assert broken.one(held.state) == want


def test_only_what_is_shared_has_a_variate(toy: Callable[..., Any]) -> None:
    rule, spec = create_aggregator("scaffold"), toy(create_aggregator("fedit")).spec
    spec = spec.with_policy("freeze", lambda t: t.name == "a").with_policy("local", lambda t: t.name == "head")
    state = toy(rule).draw(0).with_spec(spec)
    rule.start_round(state)
    sent = rule.for_site(state, "p")
    assert [tensor.name for tensor in sent.spec.extras] == ["b.control"]
    play = toy(rule)
    play.one(state)
    assert set(play.sent[0].state) == {"b", "b.control"}
    assert set(rule.memory()["control"]) == {"b"}


def test_an_update_that_stands_for_all_sites_moves_the_common_variate_whole(toy: Callable[..., Any]) -> None:
    """As central privacy sends it: one update, of no single site."""
    rule = create_aggregator("scaffold")
    state = toy(rule).draw(0)
    rule.ranks = {"p": 2, "q": 2, "r": 2}
    rule.start_round(state)
    sent = rule.for_site(state, "p")
    mean = sent.map(lambda array: array + 1.0)
    rule.add(Update("all sites together", mean, 1.0))
    got = rule.result()
    assert set(got) == set(state) and all(np.array_equal(got[name], mean[name]) for name in state)
    assert all(np.array_equal(c, np.ones(c.shape)) for c in rule.memory()["control"].values())


def test_corrections_keep_the_kind_of_the_gradients(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("scaffold")
    state = toy(rule).draw(0)
    rule.start_round(state)
    sent = rule.for_site(state, "p")
    sent = AdapterState(sent.spec, {**sent, "head.control": np.array([1.0, -2.0])})
    local = rule.local(Training("p", 1, 2, 0.1), {})
    assert local is not None
    local.begin(sent)
    gradient = torch.ones(2, dtype=torch.float32)
    got = [local.direction("head", gradient * k, gradient, gradient, k) for k in (1, 2)]
    assert [g.tolist() for g in got] == [[2.0, -1.0], [3.0, 0.0]] and got[0].dtype == torch.float32
    answer = local.finish(sent, sent)
    assert answer["head.control"].tolist() == [2.5, -0.5] and local.remember()["control"]["head.control"].tolist() == [
        1.5,
        1.5,
    ]


@pytest.mark.slow
def test_a_whole_run_goes_on_after_a_stop(tiny_federation: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": "scaffold", "rounds": 3}
    whole = tiny_federation.run(tiny_federation.config(**settings), tmp_path / "whole")
    tiny_federation.run(tiny_federation.config(**{**settings, "rounds": 1}), tmp_path / "parts")
    parts = tiny_federation.resume(tiny_federation.config(**settings), tmp_path / "parts", rounds=3)
    assert parts["digest"] == whole["digest"]


def test_the_variates_cost_no_budget(tiny_federation: Any, tmp_path: Path) -> None:
    private = tiny_federation.run(tiny_federation.private(strategy="scaffold", rounds=2), tmp_path / "private")
    other = tiny_federation.run(tiny_federation.private(rounds=2), tmp_path / "other")
    spent = [{site: told["epsilon"] for site, told in run["sites"].items()} for run in (private, other)]
    assert spent[0] == spent[1] and private["digest"] != other["digest"]


def test_it_works_under_central_privacy(tiny_federation: Any, tmp_path: Path) -> None:
    central = {"central.enabled": True, "central.epsilon": 50.0, "central.clip": 0.5}
    run = tiny_federation.run(tiny_federation.config(strategy="scaffold", rounds=2, **central), tmp_path / "run")
    assert run["status"] == "finished" and run["central"]["rounds"] == 2
