"""Client-level privacy: the sensitivity of a round's sum, its noise, the adaptive clip, and what a plan refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from fedgraft.core.config import parse_config
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.privacy import Event, calibrate_noise, epsilon
from fedgraft.privacy.central import CentralPlan, ClippedSum, next_clip, noise_beside_count
from fedgraft.privacy.noise import RandomStream


class Silence:
    """No noise at all."""

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def uniform(self, count: int) -> np.ndarray:
        return np.full(count, 0.5)


def config(sites: int = 10, rounds: int = 50, **central: Any) -> Any:
    values = {"enabled": True, "epsilon": 8.0, "delta": 1e-3, **central}
    names = [f"site-{number:04d}" for number in range(sites)]
    return parse_config({"model": "m", "rounds": rounds, "central": values, "data": {"path": "d", "sites": names}})


def plan(sites: int = 10, **changes: Any) -> CentralPlan:
    """A plan of so much epsilon that only what a test is about can be wrong with it."""
    values: dict[str, Any] = {
        "sites": sites,
        "sampling_rate": 1.0,
        "rounds": 3,
        "clip": 1.5,
        "noise_multiplier": 1.0,
        "epsilon": 60.0,
        "delta": 1e-4,
    }
    return CentralPlan(**{**values, **changes})


def gaussian_delta(mu: float, target: float) -> float:
    """Balle and Wang 2018, theorem 8, in terms of mu = sensitivity / sigma."""
    tail = math.exp(target) * stats.norm.cdf(-target / mu - mu / 2)
    return float(stats.norm.cdf(-target / mu + mu / 2) - tail)


def exact_noise(target: float, delta: float, rounds: int) -> float:
    """The least noise multiplier of ``rounds`` Gaussian releases without sampling, in closed form."""
    mu = brentq(lambda m: gaussian_delta(m, target) - delta, 1e-3, 100)
    return math.sqrt(rounds) / float(mu)


# Sensitivity


def neighbours(draw: np.random.Generator, parameters: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Changes of some sites and that of one more: of all lengths, some equal, some opposite, some zero."""
    sites = [draw.standard_normal(parameters) * 10.0 ** draw.uniform(-8, 8) for _ in range(int(draw.integers(0, 6)))]
    kinds = [
        lambda: draw.standard_normal(parameters) * 10.0 ** draw.uniform(-8, 8),
        lambda: -1e12 * sites[0] if sites else np.full(parameters, 1e150),
        lambda: sites[0].copy() if sites else np.zeros(parameters),
        lambda: np.zeros(parameters),
        lambda: np.full(parameters, 1e153),
        lambda: np.full(parameters, 5e-324),
    ]
    return sites, kinds[int(draw.integers(len(kinds)))]()


def summed(settings: CentralPlan, changes: list[np.ndarray], parameters: int) -> tuple[np.ndarray, float]:
    total = ClippedSum(settings, parameters)
    for change in changes:
        total.add(change)
    return total.release(Silence())


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_one_site_more_moves_the_mean_by_at_most_the_clip_over_the_fixed_denominator(rate: float) -> None:
    draw = np.random.default_rng(3)
    settings = plan(clip=0.7, sampling_rate=rate, clip_quantile=0.5)
    moved = []
    for _ in range(400):
        parameters = int(draw.integers(1, 40))
        sites, one = neighbours(draw, parameters)
        mean, share = summed(settings, sites, parameters)
        at = int(draw.integers(len(sites) + 1))
        other, other_share = summed(settings, [*sites[:at], one, *sites[at:]], parameters)
        moved.append(np.linalg.norm(other - mean) * 10 * rate / 0.7)
        assert abs(other_share - share) == pytest.approx(0.5 / (10 * rate), rel=1e-9)
    assert max(moved) <= 1 + 1e-6
    # Otherwise the bound would be kept by a mechanism that does nothing.
    assert sum(value > 1 - 1e-6 for value in moved) > 100


def test_the_mean_is_that_of_the_clipped_changes_one_by_one() -> None:
    draw = np.random.default_rng(4)
    changes = [draw.standard_normal(7) * size for size in (0.01, 0.4, 3.0, 50.0)]
    mean, _ = summed(plan(sampling_rate=0.5), changes, 7)
    slowly = [0.0] * 7
    for change in changes:
        norm = math.sqrt(sum(float(x) ** 2 for x in change))
        slowly = [s + float(x) * min(1.0, 1.5 / norm) for s, x in zip(slowly, change, strict=True)]
    assert np.allclose(mean, [s / 5 for s in slowly], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_change_that_is_not_finite_is_refused_and_leaves_no_trace(bad: float) -> None:
    total, settings = ClippedSum(plan(), 3), plan()
    total.add(np.array([0.5, 0.0, 0.0]))
    with pytest.raises(NonFiniteError):
        total.add(np.array([0.1, bad, bad]))
    mean, _ = total.release(Silence())
    assert np.array_equal(mean, np.array([0.5, 0.0, 0.0]) / settings.expected_sites)


def test_a_change_of_another_length_or_precision_is_a_mistake_of_the_caller() -> None:
    total = ClippedSum(plan(), 3)
    for change in (np.zeros(4), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="a change is"):
            total.add(change)


def test_a_sum_is_released_once() -> None:
    total = ClippedSum(plan(), 3)
    total.release(Silence())
    with pytest.raises(ValueError, match="released once"):
        total.release(Silence())


# Noise


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_the_noise_on_the_mean_has_the_length_and_the_shape_that_are_accounted_for(quantile: float) -> None:
    settings = plan(sampling_rate=0.4, noise_multiplier=2.0, clip_quantile=quantile)
    parameters, rounds = 500, 40
    stream = RandomStream.seeded_not_private("test", quantile)
    draw = np.random.default_rng(5)
    drawn, counts = [], []
    for _ in range(rounds):
        changes = [draw.standard_normal(parameters) for _ in range(3)]
        total = ClippedSum(settings, parameters, clip=0.3)
        for change in changes:
            total.add(change)
        mean, share = total.release(stream)
        clean, clean_share = summed(replace(settings, clip=0.3), changes, parameters)
        drawn.append((mean - clean) * settings.expected_sites / (settings.sum_noise * 0.3))
        counts.append((share - clean_share) * settings.expected_sites / settings.count_noise)
    z = np.array(drawn)
    square = float((z**2).sum())
    assert stats.chi2.sf(square, z.size) > 1e-3
    assert stats.chi2.cdf(square, z.size) > 1e-3
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    # Fresh in every round, and no coordinate left out.
    assert abs(np.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1]) < 4 / math.sqrt(z.size)
    assert stats.chi2.sf((z**2).sum(axis=0), rounds).min() > 1e-3 / parameters
    assert stats.chi2.cdf((z**2).sum(axis=0), rounds).min() > 1e-3 / parameters
    if quantile:
        assert stats.kstest(counts, "norm").pvalue > 1e-3
        # Each release is a Gaussian mechanism of sensitivity C and 1/2: together they are one of multiplier z.
        together = settings.sum_noise**-2 + (0.5 / settings.count_noise) ** 2
        assert together**-0.5 == pytest.approx(2.0, rel=1e-12)
        assert settings.sum_noise <= 2.0 * math.sqrt(4 / 3) * (1 + 1e-12)
    else:
        assert settings.sum_noise == 2.0 and not any(counts)


def test_noise_goes_out_even_when_nobody_answers() -> None:
    mean, _ = ClippedSum(plan(), 1000).release(RandomStream.from_os())
    assert 0.1 < mean.std() / (1.5 / 10) < 10


@pytest.mark.parametrize(("noise", "count"), [(1.0, 0.51), (1.0, 50.0), (3.4, 1.8), (0.2, 0.11)])
def test_the_noise_beside_a_count_is_the_papers(noise: float, count: float) -> None:
    assert noise_beside_count(noise, count) == pytest.approx((noise**-2 - (2 * count) ** -2) ** -0.5, rel=1e-12)
    assert noise_beside_count(noise, count) > noise


@pytest.mark.parametrize(("noise", "count"), [(1.0, 0.5), (1.0, 0.1), (2.3, 0.5)])
def test_a_count_that_tells_too_much_is_refused(noise: float, count: float) -> None:
    with pytest.raises(UserError, match=r"a count with noise .* tells more than noise multiplier"):
        noise_beside_count(noise, count)


def test_the_count_takes_the_papers_noise_where_sites_are_many_and_more_where_they_are_few() -> None:
    many = plan(2000, clip_quantile=0.5, delta=1e-5, sampling_rate=0.5)
    assert many.count_noise == 1000 / 20
    assert many.sum_noise == pytest.approx(1.0, rel=1e-3)
    few = plan(10, clip_quantile=0.5)
    assert few.count_noise == 1.0
    assert few.sum_noise == pytest.approx(math.sqrt(4 / 3), rel=1e-12)


# The adaptive clip


def test_the_clip_moves_as_the_paper_says() -> None:
    """Andrew et al. 2021, algorithm 1, without its noise, beside ours."""
    draw = np.random.default_rng(6)
    norms = draw.lognormal(1.0, 0.7, size=(30, 10))
    settings = plan(clip=0.1, clip_quantile=0.6, clip_rate=0.2)
    ours = theirs = 0.1
    for row in norms:
        total = ClippedSum(settings, 2, ours)
        for norm in row:
            total.add(np.array([0.0, norm]))
        ours = total.next_clip(total.release(Silence())[1])
        theirs *= math.exp(-0.2 * (sum(1 for norm in row if norm <= theirs) / 10 - 0.6))
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 8.0])
def test_the_adaptive_clip_finds_the_quantile_through_the_noise(quantile: float, start: float) -> None:
    sites, rounds = 400, 120
    settings = plan(sites, clip=start, clip_quantile=quantile, clip_rate=0.2, noise_multiplier=1.0, delta=1e-4)
    stream, draw = RandomStream.seeded_not_private("clip", quantile, start), np.random.default_rng(7)
    clip, late = start, []
    for number in range(rounds):
        total = ClippedSum(settings, 1, clip)
        for norm in draw.lognormal(0.0, 0.5, size=sites):
            total.add(np.array([norm]))
        clip = total.next_clip(total.release(stream)[1])
        if number >= 90:
            late.append(clip)
    # A share of 400 sites with noise 20 is off by 0.05 a round, of which the clip takes a fifth.
    share = stats.lognorm.cdf(np.median(late), 0.5)
    assert abs(share - quantile) < 0.06


def test_a_clip_that_leaves_the_numbers_is_refused() -> None:
    assert next_clip(2.0, 0.5, 0.5, 0.2) == 2.0
    for within, rate in ((-1e9, 1.0), (1e9, 1.0), (-5e3, 0.2)):
        with pytest.raises(UserError, match=r"lower central\.clip_rate"):
            next_clip(1.0, within, 0.5, rate)


# Accounting


def test_the_figure_for_ten_hospitals() -> None:
    """PRIVACY: n = 10, T = 50, epsilon 8 is 0.23 C a coordinate; true for delta just below 1/10 and no smaller one."""
    for delta, published in ((0.09, 0.23), (1e-3, 0.34), (1e-5, 0.42)):
        made = CentralPlan.for_run(config(delta=delta), 50)
        assert round(made.noise_on_mean, 2) == published
        assert made.noise_multiplier == pytest.approx(exact_noise(8.0, delta, 50), rel=2e-3)
        assert made.noise_multiplier >= exact_noise(8.0, delta, 50) - 1e-9
        assert made.final_epsilon <= 8.0


def test_the_figure_for_patients_that_the_warning_gives() -> None:
    """N = 5000, B = 256, T = 1000, epsilon 3 (delta 1e-5): 0.009 C a coordinate."""
    assert round(calibrate_noise(3.0, 1e-5, 256 / 5000, 1000) / 256, 3) == 0.009


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_a_plan_takes_the_least_noise_that_keeps_epsilon(rate: float) -> None:
    made = CentralPlan.for_run(config(sites=100, rounds=20, sampling_rate=rate, epsilon=4.0), 20)
    assert made.final_epsilon == epsilon((Event(made.noise_multiplier, rate, 20),), 1e-3) <= 4.0
    assert epsilon((Event(made.noise_multiplier - 0.01, rate, 20),), 1e-3) > 4.0
    assert made.expected_sites == 100 * rate
    assert made.noise_on_mean == made.noise_multiplier / (100 * rate)


def test_what_was_lost_is_paid_for_by_more_noise_in_the_rounds_that_remain() -> None:
    settings = config(rounds=6)
    first = CentralPlan.for_run(settings, 6)
    on = CentralPlan.for_run(settings, 4, (first.event, first.event))
    assert on.noise_multiplier == first.noise_multiplier
    again = CentralPlan.for_run(settings, 5, (first.event, first.event))
    assert again.noise_multiplier > first.noise_multiplier
    assert epsilon((*again.spent, *[again.event] * 5), 1e-3) <= 8.0


def test_at_the_end_a_plan_says_what_the_last_round_took() -> None:
    over = CentralPlan.for_run(config(rounds=2), 0, (Event(2.0, 1.0, 1), Event(3.0, 1.0, 1)))
    assert (over.noise_multiplier, over.rounds) == (3.0, 0)
    assert over.final_epsilon == epsilon(over.spent, 1e-3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"delta": 0.1}, r"central\.delta 0\.1 is not below 1/10, the chance of naming one of the 10 sites outright"),
        ({"delta": 0.5}, r"central\.delta 0\.5 is not below 1/10"),
        (
            {"epsilon": 1e-4, "delta": 1e-6},
            r"central\.epsilon 0\.0001 at central\.delta 1e-06 cannot be reached in 50 rou",
        ),
        ({"noise_multiplier": 0.01}, r"central\.noise_multiplier is 0\.01; below 0\.1 there is no guarantee"),
        (
            {"noise_multiplier": 1.0},
            r"central noise multiplier 1 spends epsilon .* more than central\.epsilon 8; raise",
        ),
    ],
)
def test_a_plan_that_cannot_be_kept_does_not_construct(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        CentralPlan.for_run(config(**changes), 50)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": 0}, "at least one site"),
        ({"sampling_rate": 0.0}, r"central\.sampling_rate is 0"),
        ({"sampling_rate": 1.1}, r"central\.sampling_rate is 1\.1"),
        ({"rounds": -1}, "a central privacy plan of -1 rounds"),
        ({"delta": 0.0}, r"central\.delta is 0"),
        ({"clip": 0.0}, r"central\.clip is 0"),
        ({"clip": math.inf}, r"central\.clip is inf"),
        ({"clip": math.nan}, r"central\.clip is nan"),
        ({"epsilon": math.nan}, r"central\.epsilon is nan"),
        ({"noise_multiplier": math.nan}, r"central\.noise_multiplier is nan"),
        ({"noise_multiplier": math.inf}, r"central\.noise_multiplier is inf"),
        ({"clip_quantile": 1.0}, r"central\.clip_quantile is 1"),
        ({"clip_quantile": 0.5, "clip_rate": -1.0}, r"central\.clip_rate is -1"),
        ({"epsilon": 1.0}, r"more than central\.epsilon 1"),
        ({"spent": (Event(0.3, 1.0, 50),)}, r"more than central\.epsilon 60"),
    ],
)
def test_settings_without_a_guarantee_do_not_construct(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        plan(**changes)


def test_a_sum_needs_a_bound() -> None:
    for clip in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="the clip is"):
            ClippedSum(plan(), 3, clip)


# The warning


def test_few_sites_are_told_how_much_the_noise_drowns_and_how_many_would_do() -> None:
    made = CentralPlan.for_run(config(delta=0.09), 50)
    parameters = 82454
    said = made.warning(parameters)
    noise = made.noise_multiplier
    assert "over 10 sites: every round adds noise of 0.23 x clip to each of the 82,454 shared numbers" in said
    assert f"{math.sqrt(parameters) * noise / 10:,.0f} times as long" in said
    needed = math.ceil(math.sqrt(parameters) * noise)
    assert f"about {needed:,} sites" in said
    assert 'privacy.unit = "patient"' in said
    # With so many sites the noise is as long as the longest mean, and no warning is given with more.
    level = replace(made, sites=needed, delta=1e-4, epsilon=60.0)
    assert level.noise_norm(parameters) == pytest.approx(1.0, rel=1 / needed)
    assert level.warning(parameters) == ""


def test_many_sites_are_not_warned() -> None:
    assert CentralPlan.for_run(config(sites=800, rounds=10), 10).warning(1000) == ""
