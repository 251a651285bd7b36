"""FedNova against the published normalised averaging, with and without momentum at the sites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.core.update import Update
from fedgraft.server.checkpoints import load_last
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.fednova import EFFORT, FedNova, effort


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_effort_is_what_the_gradients_count_in_the_change(steps: int, momentum: float) -> None:
    """Feed gradients of one through SGD with momentum, as torch steps."""
    y = speed = 0.0
    for _ in range(steps):
        speed = momentum * speed + 1.0
        y -= speed
    assert effort(steps, momentum) == pytest.approx(-y, rel=1e-13)


def _sites(play: Any, momentum: float) -> list[Any]:
    steps = (1, 4, 9)
    return [
        play.site(s.name, s.seed, s.weight, steps=k, momentum=momentum) for s, k in zip(play.sites, steps, strict=True)
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_three_rounds_are_the_published_loop(toy: Callable[..., Any], momentum: float) -> None:
    """x <- x - tau_eff sum p_i eta d_i with d_i = G_i a_i / |a_i|_1 (equation 6), gradients and factors spelt out."""
    play = toy(create_aggregator("fednova"))
    play.sites = _sites(play, momentum)
    start = play.draw(0)
    *_, got = play.rounds(start, 3)
    total = sum(site.weight for site in play.sites)
    x = dict(start)
    for number in (1, 2, 3):
        moved, tau = {name: np.zeros(array.shape) for name, array in x.items()}, 0.0
        for site in play.sites:
            a = [(1 - momentum ** (site.steps - j)) / (1 - momentum) for j in range(site.steps)]
            tau += site.weight / total * sum(a)
            for name in x:
                y, speed, gradients = x[name], np.zeros(x[name].shape), []
                for step in range(site.steps):
                    gradients.append(site.gradient(name, y, number, step))
                    speed = momentum * speed + gradients[-1]
                    y = y - site.lr * speed
                d = sum(factor * g for factor, g in zip(a, gradients, strict=True)) / sum(a)
                moved[name] = moved[name] + site.weight / total * site.lr * d
        x = {name: x[name] - tau * moved[name] for name in x}
    for name in x:
        np.testing.assert_allclose(got[name], x[name], rtol=1e-12, atol=1e-13)


def test_equal_steps_are_fedit(toy: Callable[..., Any]) -> None:
    nova, plain = toy(create_aggregator("fednova"), momentum=0.5), toy(create_aggregator("fedit"), momentum=0.5)
    got, want = nova.one(nova.draw(0)), plain.one(plain.draw(0))
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_site_is_the_identity(toy: Callable[..., Any], momentum: float) -> None:
    play = toy(create_aggregator("fednova"))
    play.sites = _sites(play, momentum)[2:]
    got = play.one(play.draw(0))
    for name in got:
        np.testing.assert_allclose(got[name], play.sent[0].state[name], rtol=1e-14)


def test_a_site_with_more_steps_does_not_pull_more(toy: Callable[..., Any]) -> None:
    """Gradients without noise or curvature: two sites that go opposite ways, one five times as far, cancel."""
    rule = create_aggregator("fednova")
    start = toy(rule).draw(0)
    rule.start_round(start)
    for name, way, steps in (("p", 1.0, 1), ("q", -1.0, 5)):
        sent = rule.for_site(start, name)
        moved = {n: sent[n] + way * steps for n in start}
        rule.add(Update(name, AdapterState(sent.spec, {**moved, EFFORT: np.array([float(steps)])}), 1.0))
    got = rule.result()
    for name in start:
        np.testing.assert_allclose(got[name], start[name], atol=1e-14)


@pytest.mark.parametrize("told", [0.0, -3.0, np.inf])
def test_steps_that_cannot_be_are_refused_by_site(toy: Callable[..., Any], told: float) -> None:
    rule = create_aggregator("fednova")
    start = toy(rule).draw(0)
    rule.start_round(start)
    sent = rule.for_site(start, "p")
    with pytest.raises(UserError, match="p: says that its steps come to"):
        rule.add(Update("p", AdapterState(sent.spec, {**sent, EFFORT: np.array([told])}), 1.0))


def test_what_cannot_be_averaged_is_refused(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("fednova")
    start = toy(rule).draw(0)
    rule.start_round(start)
    sent = rule.for_site(start, "p")
    with pytest.raises(NonFiniteError, match="tensor b"):
        rule.add(Update("p", AdapterState(sent.spec, {**sent, "b": np.full((3, 2), np.nan)}), 1.0))
    with pytest.raises(UserError, match="the weight of an update is"):
        rule.add(Update("p", sent, 0.0))
    other = start.with_spec(start.spec)
    small = AdapterState(other.spec.with_rank(1), {"a": np.ones((1, 3)), "b": np.ones((3, 1)), "head": np.ones(2)})
    with pytest.raises(UserError, match=r"tensor a has shape \[1, 3\], expected \[2, 3\]"):
        rule.add(Update("p", small, 1.0))
    with pytest.raises(UserError, match="no update arrived"):
        rule.result()


@pytest.mark.slow
def test_a_whole_run_with_unequal_steps_differs_from_fedit_and_one_with_equal_steps_does_not(
    tiny_federation: Any, tmp_path: Path
) -> None:
    sites = [{"name": "east", "local_steps": 1}, {"name": "north"}, {"name": "south", "local_steps": 5}]
    ends: dict[tuple[str, bool], AdapterState] = {}
    for strategy in ("fednova", "fedit"):
        for equal in (True, False):
            changes = {} if equal else {"data.sites": sites}
            folder = tmp_path / f"{strategy}-{equal}"
            tiny_federation.run(tiny_federation.config(strategy=strategy, rounds=1, **changes), folder)
            ends[strategy, equal] = load_last(folder / "checkpoints").state
    for name, array in ends["fedit", True].items():
        # float32, once rounded by each
        np.testing.assert_allclose(ends["fednova", True][name], array, rtol=1e-6, atol=1e-8)
    assert (ends["fednova", False] - ends["fedit", False]).norm() > 1e-3


@pytest.mark.parametrize("upload", ["int8", "topk"])
def test_what_a_site_says_of_its_steps_survives_a_lossy_upload(
    tiny_federation: Any, tmp_path: Path, upload: str
) -> None:
    sites = [{"name": "east", "local_steps": 1}, {"name": "north"}, {"name": "south", "local_steps": 5}]
    settings = {"strategy": "fednova", "rounds": 1, "server.upload": upload, "data.sites": sites}
    with mock.patch.object(FedNova, "add", autospec=True, side_effect=FedNova.add) as add:
        tiny_federation.run(tiny_federation.config(**settings), tmp_path / "run")
    told = {call.args[1].site: float(call.args[1].state[EFFORT][0]) for call in add.call_args_list}
    # momentum 0.5; a number that is rounded alone is rounded to itself, but for float32
    assert told == pytest.approx(
        {site: effort(steps, 0.5) for site, steps in (("east", 1), ("north", 3), ("south", 5))}
    )
