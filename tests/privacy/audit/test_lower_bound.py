"""Layer 4 of the audit: the bound of Steinke, Nasr and Jagielski against arithmetic by hand and a known mechanism."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedgraft.privacy.audit.lower_bound import epsilon_bound, lower_bound, p_value, scores


def exact_p_value(m: int, r: int, v: int, odds: int, delta: Fraction) -> Fraction:
    """Theorem 5.2 in whole numbers, for e^epsilon = ``odds``."""
    chance = Fraction(odds, odds + 1)
    mass = [math.comb(r, k) * chance**k * (1 - chance) ** (r - k) for k in range(r + 1)]
    beta = sum(mass[v:], Fraction(0))
    steepest = max((sum(mass[v - i : v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(0))
    return min(Fraction(1), beta + 2 * m * delta * steepest)


@pytest.mark.parametrize(("m", "r", "v"), [(20, 10, 9), (20, 20, 13), (50, 10, 10), (7, 4, 0), (7, 4, 1), (40, 30, 30)])
@pytest.mark.parametrize("odds", [1, 2, 5])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 20)])
def test_the_p_value_is_the_theorem_in_whole_numbers(m: int, r: int, v: int, odds: int, delta: Fraction) -> None:
    want = float(exact_p_value(m, r, v, odds, delta))
    assert p_value(m, r, v, math.log(odds), float(delta)) == pytest.approx(want, abs=1e-12)


def test_the_bound_is_the_largest_epsilon_that_is_ruled_out() -> None:
    bound = epsilon_bound(100, 60, 52, 1e-5)
    assert 0.5 < bound < 2.5
    assert p_value(100, 60, 52, bound - 1e-6, 1e-5) < 0.05 <= p_value(100, 60, 52, bound + 1e-6, 1e-5)
    assert epsilon_bound(100, 60, 30, 1e-5) == 0
    assert epsilon_bound(100, 0, 0, 1e-5) == 0
    # Every guess right: beta alone is (e^eps / (1 + e^eps))^r.
    chance = 0.05 ** (1 / 60)
    assert epsilon_bound(100, 60, 60, 0.0) == pytest.approx(math.log(chance / (1 - chance)), abs=1e-6)
    assert epsilon_bound(100, 60, 60, 1e-3) < epsilon_bound(100, 60, 60, 0.0)


def test_randomised_response_is_bounded_by_its_epsilon_and_nearly_reaches_it() -> None:
    """Each coin is told rightly with chance e / (1 + e): epsilon is 1, no more, no less."""
    random = np.random.default_rng(0)
    m = 4000
    bounds = [epsilon_bound(m, m, int(random.binomial(m, math.e / (1 + math.e))), 0.0) for _ in range(40)]
    # At 95 % each; 7 or more of 40 above has a chance of 0.3 %, and the draws are seeded.
    assert sum(bound > 1 for bound in bounds) <= 6
    assert np.mean(bounds) > 0.9


def test_the_scores_are_ridge_regression_on_the_coins() -> None:
    random = np.random.default_rng(1)
    g, released, std = random.standard_normal((6, 30)), random.standard_normal((3, 30)), 0.7
    # The same as least squares with a row of weight 1 / (2 sigma / sqrt(K)) that pulls each coin to one half.
    pull = 2 * std / math.sqrt(3)
    design, target = np.vstack([g.T, pull * np.eye(6)]), np.concatenate([released.mean(0), pull * 0.5 * np.ones(6)])
    want = np.linalg.lstsq(design, target, rcond=None)[0]
    got = scores(torch.from_numpy(g), torch.from_numpy(released), std)
    assert np.allclose(got.numpy(), want, atol=1e-10)


def released(coins: np.ndarray, sigma: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Canaries of norm 1 in 2,000 dimensions, and their noisy sum."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.nn.functional.normalize(torch.randn(len(coins), 2000, generator=generator, dtype=torch.float64), dim=1)
    noise = sigma * torch.randn(1, 2000, generator=generator, dtype=torch.float64)
    return g, torch.from_numpy(coins.astype(float))[None] @ g + noise


def test_honest_noise_stays_below_its_claim_and_no_noise_does_not() -> None:
    coins = np.random.default_rng(2).random(200) < 0.5
    claim, delta = 1.7, 1e-4  # sigma 2, once, everybody takes part: epsilon 1.70
    g, out = released(coins, 2.0, 0)
    honest = lower_bound(scores(g, out, 2.0), coins, claim, delta)
    assert honest.good and 0 <= honest.statistics["bound"] < claim
    assert len(honest.drawing["in"]) == coins.sum() and len(honest.drawing["out"]) == (~coins).sum()
    g, out = released(coins, 0.0, 0)
    naked = lower_bound(scores(g, out, 0.0), coins, claim, delta)
    assert naked.statistics["right"] == naked.statistics["guesses"] == 40
    assert naked.statistics["bound"] == naked.statistics["ceiling"] > claim
    # The verdict wants to be surer than the bound that is told.
    assert naked.statistics["bound_for_verdict"] < naked.statistics["bound"]
    (finding,) = lower_bound(scores(g, out, 0.0), coins, 0.5, delta).findings
    assert finding.startswith("the guesses show an epsilon above 1.") and finding.endswith("for these steps is 0.50")


def test_a_release_that_is_not_a_number_is_a_finding() -> None:
    coins = np.array([True, False] * 10)
    assert not lower_bound(torch.full((20,), math.nan), coins, 100.0, 1e-4).good
