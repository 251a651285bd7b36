"""Ditto: the global adapter as without it, the personal one against the published loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.errors import UserError
from fedgraft.strategies import Training, create_aggregator


@pytest.mark.parametrize("lam", [0.0, 0.5, 4.0])
def test_three_rounds_are_the_published_loop(toy: Callable[..., Any], lam: float) -> None:
    play, plain = toy(create_aggregator("ditto", {"lam": lam})), toy(create_aggregator("fedit"))
    now = play.draw(0)
    own = {site.name: dict(now) for site in play.sites}
    for number in (1, 2, 3):
        for site in play.sites:
            for name in now:
                v = own[site.name][name]
                for step in range(site.steps):
                    v = v - site.lr * (site.gradient(name, v, number, step) + lam * (v - now[name]))
                own[site.name][name] = v
        now = play.one(now)
    for site, tensors in own.items():
        for name, want in tensors.items():
            np.testing.assert_allclose(play.personal[site][name], want, rtol=1e-12, atol=1e-13)
    *_, fedit = plain.rounds(plain.draw(0), 3)
    assert now == fedit, "the global adapter knows nothing of the personal ones"


def test_a_strong_term_leaves_little_personal(toy: Callable[..., Any]) -> None:
    apart = []
    for lam in (0.0, 1.0, 15.0):
        play = toy(create_aggregator("ditto", {"lam": lam}), steps=10)
        now = play.draw(0)
        before = now
        for _ in range(3):
            before, now = now, play.one(now)
        apart.append(float(np.abs(play.personal["p"]["a"] - before["a"]).max()))
    assert apart[0] > 1.5 * apart[1] > 3 * apart[2] > 0


def test_asked_before_any_training_it_says_that_there_is_a_second_one() -> None:
    rule = create_aggregator("ditto").local(Training("s", 1, 1, 0.1), {})
    assert rule is not None and rule.personal() is not None


def test_its_term_keeps_the_kind_of_the_tensors(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("ditto", {"lam": 2.0}).local(Training("s", 1, 1, 0.1), {})
    assert rule is not None
    anchor = toy(create_aggregator("fedit")).draw(0)
    rule.begin(anchor)
    personal = rule.personal()
    assert personal is not None
    one, three = torch.ones(2), torch.full((2,), 3.0)
    got = personal.direction("head", one, three, one, 0)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), 1 + 2 * (3 - anchor["head"]), rtol=1e-6)


@pytest.mark.slow
def test_a_whole_run_evaluates_the_personal_adapters(tiny_federation: Any, tmp_path: Path) -> None:
    own = tiny_federation.run(tiny_federation.config(strategy="ditto", strategy_options={"lam": 0.0}), tmp_path / "own")
    plain = tiny_federation.run(tiny_federation.config(), tmp_path / "plain")
    assert own["digest"] == plain["digest"], "the global adapter is FedIT's"
    assert own["accuracy"]["before"] == plain["accuracy"]["before"]
    assert own["loss"]["after"] != plain["loss"]["after"], "what is evaluated is not"


def test_a_second_training_is_refused_under_privacy(tiny_federation: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="second"):
        tiny_federation.run(tiny_federation.private(strategy="ditto"), tmp_path / "run")
