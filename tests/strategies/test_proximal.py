"""FedProx against the published local problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.errors import UserError
from fedgraft.strategies import Training, create_aggregator


def _loop(toy: Any, start: Any, rounds: int, mu: float) -> dict[str, np.ndarray]:
    """Algorithm 2 of Li et al. with SGD on F_k(y) + mu/2 |y - x|^2."""
    x = {name: array.copy() for name, array in start.items()}
    total = sum(site.weight for site in toy.sites)
    for number in range(1, rounds + 1):
        mean = {name: np.zeros(array.shape) for name, array in x.items()}
        for site in toy.sites:
            for name in x:
                y = x[name].copy()
                for step in range(site.steps):
                    y = y - site.lr * (site.gradient(name, y, number, step) + mu * (y - x[name]))
                mean[name] += site.weight / total * y
        x = mean
    return x


@pytest.mark.parametrize("mu", [0.0, 0.3, 5.0])
def test_three_rounds_are_the_published_loop(toy: Callable[..., Any], mu: float) -> None:
    play = toy(create_aggregator("fedprox", {"mu": mu}), steps=4)
    start = play.draw(0)
    *_, got = play.rounds(start, 3)
    for name, want in _loop(play, start, 3, mu).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-13, atol=1e-14)


def test_without_the_term_it_is_fedit(toy: Callable[..., Any]) -> None:
    prox, plain = toy(create_aggregator("fedprox", {"mu": 0})), toy(create_aggregator("fedit"))
    assert prox.one(prox.draw(0)) == plain.one(plain.draw(0))


def test_a_stronger_term_keeps_the_sites_nearer(toy: Callable[..., Any]) -> None:
    moved = []
    for mu in (0.0, 2.0, 15.0):
        play = toy(create_aggregator("fedprox", {"mu": mu}), steps=8)
        start = play.draw(0)
        moved.append((play.one(start) - start).norm())
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2]


def test_a_personal_tensor_is_free(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedprox", {"mu": 3.0}))
    free = toy(create_aggregator("fedit"))
    personal = play.spec.with_policy("local", lambda tensor: tensor.name == "head")
    for run in (play, free):
        run.one(run.draw(0).with_spec(personal))
    for site in "pqr":
        assert np.array_equal(play.memories[site]["own"]["head"], free.memories[site]["own"]["head"])


def test_its_term_keeps_the_kind_of_the_tensors(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("fedprox", {"mu": 2.0}).local(Training("s", 1, 1, 0.1), {})
    assert rule is not None
    rule.begin(toy(create_aggregator("fedit")).draw(0))
    one, three = torch.ones(2, dtype=torch.float32), torch.full((2,), 3.0)
    got = rule.direction("head", one, three, one, 0)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float32 and got.tolist() == [5.0, 5.0]


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy_options\.mu: .*greater than or equal to 0"):
        create_aggregator("fedprox", {"mu": -1})
