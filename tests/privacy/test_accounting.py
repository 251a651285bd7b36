"""Epsilon against published rows, closed forms and an independent convolution; calibration as its inverse."""

from __future__ import annotations

import itertools
import math
import time

import dp_accounting
import numpy as np
import pytest
from scipy.stats import norm

from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import MAX_NOISE, MIN_NOISE, Event, calibrate_noise, epsilon, merged


def _loss_by_fft(events: list[Event], delta: float, *, step: float = 5e-4, span: float = 250.0) -> float:
    """Epsilon by convolving discretised privacy losses, rounded to the nearest grid point: no bound, an estimate."""
    size = 2 * int(span / step)
    worst = 0.0
    for added in (False, True):
        spectrum = np.ones(size // 2 + 1, dtype=complex)
        for event in events:
            q, sigma = event.sampling_rate, event.noise_multiplier
            edges = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001)
            x = (edges[1:] + edges[:-1]) / 2
            without, shifted = np.diff(norm.cdf(edges, 0, sigma)), np.diff(norm.cdf(edges, 1, sigma))
            with_unit = (1 - q) * without + q * shifted
            loss = np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, np.log(q) + (2 * x - 1) / (2 * sigma**2))
            mass, loss = (without, -loss) if added else (with_unit, loss)
            at = np.round(np.clip(loss, -span / 2, span / 2) / step).astype(int) % size
            spectrum *= np.fft.rfft(np.bincount(at, weights=mass, minlength=size)) ** event.steps
        total = np.fft.irfft(spectrum, size)
        losses = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size) * step
        order = np.argsort(losses)
        losses, total = losses[order], np.clip(total[order], 0, None)

        def spent(eps: float, losses: np.ndarray = losses, total: np.ndarray = total) -> float:
            above = losses > eps
            return float(np.sum(total[above] * -np.expm1(eps - losses[above])))

        low, high = 0.0, span / 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > delta else (low, middle)
        worst = max(worst, high)
    return worst


def _gaussian(sigma: float, steps: int, delta: float) -> float:
    """Exact epsilon of ``steps`` Gaussian releases without sampling (Balle and Wang 2018)."""
    mu = math.sqrt(steps) / sigma

    def spent(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


# Columns of the table of accountants in PRIVACY.md, section 4, row "dp-accounting PLD (1e-3)".
COLUMNS = [
    (Event(1.0, 0.01, 1000), 1e-5, 1.829),
    (Event(0.8, 0.1, 500), 1e-5, 25.924),
    (Event(1.2, 0.05, 200), 1e-5, 3.383),
    (Event(0.7, 0.02, 2000), 1e-6, 14.472),
]


@pytest.mark.parametrize(("event", "delta", "published"), COLUMNS)
def test_matches_the_published_row_and_an_independent_convolution(event: Event, delta: float, published: float) -> None:
    got = epsilon((event,), delta)
    assert got == pytest.approx(published, rel=5e-3)
    independent = _loss_by_fft([event], delta)
    assert got == pytest.approx(independent, rel=5e-3)
    # An upper bound: never below the estimate by more than the estimate's own rounding.
    assert got >= independent * (1 - 1e-3)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (5.0, 20), (20.0, 300)])
def test_without_sampling_it_is_the_exact_gaussian(sigma: float, steps: int) -> None:
    exact = _gaussian(sigma, steps, 1e-5)
    got = epsilon((Event(sigma, 1.0, steps),), 1e-5)
    assert exact * (1 - 1e-6) <= got <= exact * 1.005


def test_unequal_events_compose_jointly() -> None:
    events = [Event(1.0, 0.02, 200), Event(0.8, 0.05, 40), Event(2.0, 1.0, 3)]
    got = epsilon(tuple(events), 1e-5)
    assert got == pytest.approx(_loss_by_fft(events, 1e-5), rel=5e-3)
    alone = [epsilon((event,), 1e-5) for event in events]
    # More than any part, and less than the parts' epsilons added up (whose deltas would add up besides).
    assert max(alone) < got < sum(alone)


def test_composition_does_not_depend_on_order_or_splitting() -> None:
    parts = (Event(1.0, 0.02, 30), Event(0.9, 0.02, 20), Event(1.0, 0.02, 70))
    whole = (Event(0.9, 0.02, 20), Event(1.0, 0.02, 100))
    for order in itertools.permutations(parts):
        assert merged(order) == whole
        assert epsilon(order, 1e-5) == epsilon(whole, 1e-5)


def test_a_restart_every_round_costs_what_one_long_run_costs() -> None:
    round_ = Event(1.1, 0.05, 10)
    spent = [epsilon((round_,) * rounds, 1e-5) for rounds in (1, 2, 3)]
    assert spent[0] < spent[1] < spent[2] == epsilon((Event(1.1, 0.05, 30),), 1e-5)


def test_nothing_spent_is_zero() -> None:
    assert epsilon((), 1e-5) == 0.0


def test_more_noise_fewer_steps_rarer_sampling_and_larger_delta_cost_less() -> None:
    base = epsilon((Event(1.0, 0.1, 50),), 1e-5)
    assert epsilon((Event(1.1, 0.1, 50),), 1e-5) < base
    assert epsilon((Event(1.0, 0.1, 40),), 1e-5) < base
    assert epsilon((Event(1.0, 0.08, 50),), 1e-5) < base
    assert epsilon((Event(1.0, 0.1, 50),), 1e-4) < base


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (True, 0.1, 1),
        ("1.0", 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, 0),
        (1.0, 0.1, 1.5),
        (1.0, 0.1, True),
    ],
)
def test_an_event_without_meaning_does_not_construct(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match=r"noise|rate|steps"):
        Event(noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon((Event(1.0, 0.1, 1),), delta)


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(8.0, 0.1, 24), (1.0, 0.02, 100), (3.0, 0.05, 1000), (0.5, 1.0, 20)]
)
def test_calibration_inverts_epsilon(target: float, rate: float, steps: int) -> None:
    noise = calibrate_noise(target, 1e-5, rate, steps)
    assert epsilon((Event(noise, rate, steps),), 1e-5) <= target
    # It is the least one to 2e-3.
    assert epsilon((Event(noise - 2.1e-3, rate, steps),), 1e-5) > target


def test_calibration_counts_what_was_spent() -> None:
    spent = (Event(0.9, 0.1, 6), Event(1.5, 0.2, 4))
    noise = calibrate_noise(5.0, 1e-5, 0.1, 20, spent)
    assert noise > calibrate_noise(5.0, 1e-5, 0.1, 20)
    assert epsilon((*spent, Event(noise, 0.1, 20)), 1e-5) <= 5.0
    assert epsilon((*spent, Event(noise - 2.1e-3, 0.1, 20)), 1e-5) > 5.0


def test_a_budget_that_is_nearly_spent_asks_for_far_more_noise() -> None:
    spent = (Event(1.0, 0.1, 60),)
    already = epsilon(spent, 1e-5)
    noise = calibrate_noise(already * 1.02, 1e-5, 0.1, 20, spent)
    assert noise > 2 * calibrate_noise(already * 1.02, 1e-5, 0.1, 20)
    assert epsilon((*spent, Event(noise, 0.1, 20)), 1e-5) <= already * 1.02


def test_a_search_that_stops_short_is_carried_on_to_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    search = dp_accounting.calibrate_dp_mechanism
    monkeypatch.setattr(dp_accounting, "calibrate_dp_mechanism", lambda *a, **k: search(*a, **k) - 0.01)
    noise = calibrate_noise(2.5, 1e-5, 0.11, 17)
    assert epsilon((Event(noise, 0.11, 17),), 1e-5) <= 2.5 < epsilon((Event(noise - 2.1e-3, 0.11, 17),), 1e-5)


def test_a_huge_budget_stops_at_the_least_noise_and_does_not_take_minutes() -> None:
    began = time.process_time()
    assert calibrate_noise(500.0, 1e-5, 0.01, 1) == pytest.approx(MIN_NOISE)
    assert time.process_time() - began < 30


@pytest.mark.parametrize("spent", [(), (Event(0.5, 0.5, 10),)])
def test_an_unreachable_budget_is_refused_in_one_line(spent: tuple[Event, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        calibrate_noise(0.05, 1e-5, 0.5, 1000, spent)
    text = str(refusal.value)
    assert "\n" not in text
    assert "privacy.epsilon 0.05" in text and f"even noise {MAX_NOISE:g}" in text and "fewer rounds" in text
    assert ("already spent" in text) == bool(spent)
