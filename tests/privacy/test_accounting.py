"""Epsilon against published rows, closed forms and an independent convolution; calibration as its inverse."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from opacus.accountants.analysis import gdp
from scipy.integrate import quad
from scipy.stats import binom, norm

from fedgraft.core.errors import UserError
from fedgraft.privacy import accounting
from fedgraft.privacy.accounting import MAX_NOISE, MIN_NOISE, Event, above, calibrate_noise, epsilon, merged
from fedgraft.privacy.losses import check_epsilon

RELATIONS = ("add_remove", "replace_one")


def _gaussian(sigma: float, steps: int, delta: float, reach: int = 1) -> float:
    """Exact epsilon of ``steps`` Gaussian releases of sensitivity ``reach`` without sampling (Balle and Wang 2018)."""
    mu = reach * math.sqrt(steps) / sigma

    def spent(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


# Columns of the table of accountants in PRIVACY.md, section 4: "dp-accounting PLD (1e-3)", "PLD, replace-one
# neighbours" and "dp-accounting RDP".
COLUMNS = [
    (Event(1.0, 0.01, 1000), 1e-5, 1.829, 2.844, 2.101),
    (Event(0.8, 0.1, 500), 1e-5, 25.924, 40.75, 28.63),
    (Event(1.2, 0.05, 200), 1e-5, 3.383, 5.489, 3.778),
    (Event(0.7, 0.02, 2000), 1e-6, 14.472, 20.00, 15.89),
]


@pytest.mark.parametrize(("event", "delta", "published", "replaced", "renyi"), COLUMNS)
def test_matches_the_published_rows_and_an_independent_convolution(
    event: Event, delta: float, published: float, replaced: float, renyi: float
) -> None:
    assert epsilon((event,), delta, accountant="rdp") == pytest.approx(renyi, rel=5e-3)
    for neighbours, row in zip(RELATIONS, (published, replaced), strict=True):
        got = epsilon((event,), delta, neighbours)
        assert got == pytest.approx(row, rel=5e-3)
        checked = check_epsilon((event,), delta, neighbours)
        assert got == pytest.approx(checked.estimate, rel=5e-3)
        assert got >= checked.least > 0.99 * row


@pytest.mark.parametrize("neighbours", RELATIONS)
@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ((Event(10.0, 0.001, 100),), 1e-5),  # a tiny epsilon
        ((Event(1000.0, 0.5, 100),), 1e-5),
        ((Event(1.0, 0.001, 1_000_000),), 1e-5),  # many steps
        ((Event(100.0, 0.5, 100_000),), 1e-5),
        ((Event(1.0, 1e-6, 1_000_000),), 1e-6),  # rarely anybody
        ((Event(2.0, 1.0, 1),), 1e-5),  # no sampling
        ((Event(0.3, 0.1, 100),), 1e-5),  # next to no noise
        ((Event(1.0, 0.01, 1000),), 1e-9),  # a tiny delta
        ((Event(1.0, 0.3, 20),), 0.05),  # a large one
        ((Event(1.0, 0.02, 200), Event(0.8, 0.05, 40), Event(2.0, 1.0, 3)), 1e-5),
    ],
    ids=str,
)
def test_no_accountant_reads_below_the_truth(events: tuple[Event, ...], delta: float, neighbours: str) -> None:
    least = check_epsilon(events, delta, neighbours).least
    assert least > 0
    for accountant in accounting.ACCOUNTANTS:
        assert epsilon(events, delta, neighbours, accountant) >= least


@pytest.mark.parametrize(("neighbours", "reach"), [("add_remove", 1), ("replace_one", 2)])
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (5.0, 20), (20.0, 300), (200.0, 1)])
def test_without_sampling_it_is_the_exact_gaussian_of_sensitivity_c_or_2c(
    sigma: float, steps: int, neighbours: str, reach: int
) -> None:
    exact = _gaussian(sigma, steps, 1e-6, reach)
    got = epsilon((Event(sigma, 1.0, steps),), 1e-6, neighbours)
    assert exact * (1 - 1e-6) <= got <= exact * 1.005
    assert exact <= epsilon((Event(sigma, 1.0, steps),), 1e-6, neighbours, "rdp") <= exact * 1.6


@pytest.mark.parametrize(("noise", "rate", "steps"), [(10.0, 0.01, 1000), (1000.0, 0.5, 100)])
def test_losses_that_are_small_beside_the_grid_get_a_finer_one(noise: float, rate: float, steps: int) -> None:
    event = Event(noise, rate, steps)
    assert epsilon((event,), 1e-6) == pytest.approx(check_epsilon((event,), 1e-6).estimate, rel=0.02)
    coarse = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    coarse.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    assert coarse.get_epsilon(1e-6) > 1.05 * epsilon((event,), 1e-6)


def test_a_unit_that_is_replaced_costs_up_to_twice_as_much() -> None:
    event = (Event(1.0, 0.05, 100),)
    assert epsilon(event, 1e-5) < epsilon(event, 1e-5, "replace_one") < 2.2 * epsilon(event, 1e-5)


def test_unequal_events_compose_jointly() -> None:
    events = [Event(1.0, 0.02, 200), Event(0.8, 0.05, 40), Event(2.0, 1.0, 3)]
    got = epsilon(tuple(events), 1e-5)
    assert got == pytest.approx(check_epsilon(tuple(events), 1e-5).estimate, rel=5e-3)
    alone = [epsilon((event,), 1e-5) for event in events]
    # More than any part, and less than the parts' epsilons added up (whose deltas would add up besides).
    assert max(alone) < got < sum(alone)


@pytest.mark.parametrize(("rate", "noise"), [(0.01, 0.5), (0.3, 1.0), (0.3, 3.0)])
def test_renyi_divergences_of_a_replaced_unit_are_the_integral(rate: float, noise: float) -> None:
    got = accounting._renyi_replaced(rate, noise)

    def log_mixture(x: float, mean: float) -> float:
        parts = math.log(1 - rate) + norm.logpdf(x, 0, noise), math.log(rate) + norm.logpdf(x, mean, noise)
        return float(np.logaddexp(*parts))

    for order in (1.5, 8.0):
        whole = quad(
            lambda x, order=order: math.exp(order * log_mixture(x, 1) + (1 - order) * log_mixture(x, -1)),
            -12 * noise,
            12 * noise + 2 * order,
            limit=200,
            epsabs=0,
            points=[0, 1, order, 2 * order],
        )[0]
        at = int(np.flatnonzero(order == accounting._ORDERS)[0])
        assert got[at] == pytest.approx(math.log(whole) / (order - 1), rel=1e-8)


@pytest.mark.parametrize("rate", [1e-12, 1e-9, 1e-7, 1e-4])
@pytest.mark.parametrize("noise", [1.0, 30.0])
def test_rounding_never_takes_from_a_renyi_divergence(rate: float, noise: float) -> None:
    # Of order 2 it has a closed form: log(1 + q^2 (exp(1 / z^2) - 1)).
    exact = math.log1p(rate**2 * math.expm1(noise**-2))
    at = int(np.flatnonzero(accounting._ORDERS == 2)[0])
    got = accounting._renyi(Event(noise, rate, 1), "add_remove")[at]
    assert exact <= got <= exact + 1e-13


def _released(others: int, rate: float, most: int, own: float | None, other: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and means of a cut-down sample's sum: ``others`` units give ``other`` each, and one gives ``own``."""
    weights, means = [], []
    for sampled, chance in enumerate(binom.pmf(np.arange(others + 1), others, rate)):
        if own is None:
            weights.append(chance)
            means.append(min(sampled, most) * other)
            continue
        stays = min(1.0, most / (sampled + 1))
        weights += [chance * (1 - rate), chance * rate * stays, chance * rate * (1 - stays)]
        means += [min(sampled, most) * other, min(sampled, most - 1) * other + own, most * other]
    return np.array(weights), np.array(means)


def _one_step(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], noise: float, d: float) -> float:
    """Epsilon of one step between two mixtures of normals, by integration, both ways round."""
    x = np.linspace(-16, 16, 6_001)
    p, q = (norm.pdf(x[:, None], means, noise) @ weights * (x[1] - x[0]) for weights, means in (one, two))
    worst = 0.0
    for first, second in ((p, q), (q, p)):
        low, high = 0.0, 60.0
        for _ in range(50):
            middle = (low + high) / 2
            left = float(np.maximum(first - math.exp(middle) * second, 0).sum())
            low, high = (middle, high) if left > d else (low, middle)
        worst = max(worst, high)
    return worst


@pytest.mark.parametrize(
    ("units", "rate", "most", "noise", "delta"),
    [(20, 0.2, 5, 0.7, 1e-3), (12, 0.5, 6, 0.8, 1e-2), (10, 1.0, 5, 0.8, 1e-2)],
)
def test_cut_down_samples_never_cost_more_than_is_told(
    units: int, rate: float, most: int, noise: float, delta: float
) -> None:
    """Against data sets of ``units`` where the others push one way and the unit in question the same or the other."""
    event = (Event(noise, rate, 1, units, most),)
    added, replaced = 0.0, 0.0
    for other in (-1.0, 0.0, 1.0):
        for others in (units - 1, units):  # one unit removed, one unit added
            pair = _released(others, rate, most, 1, other), _released(others, rate, most, None, other)
            added = max(added, _one_step(*pair, noise, delta))
        pair = _released(units - 1, rate, most, 1, other), _released(units - 1, rate, most, -1, other)
        replaced = max(replaced, _one_step(*pair, noise, delta))
    assert 0 < added <= epsilon(event, delta)
    assert 0 < replaced <= epsilon(event, delta, "replace_one")


def test_cutting_down_costs_more_the_more_often_it_happens() -> None:
    often, seldom, never = (epsilon((Event(2.0, 0.1, 10, 1000, most),), 1e-5) for most in (100, 130, 200))
    assert often > seldom > never == pytest.approx(epsilon((Event(2.0, 0.1, 10),), 1e-5), rel=1e-9)


def test_the_larger_of_two_neighbouring_data_sets_decides_how_often_samples_are_cut_down() -> None:
    told = epsilon((Event(1.0, 0.2, 1, 20, 4),), 1e-3)
    with_one_more = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    with_one_more.compose(dp_accounting.TruncatedSubsampledGaussianDpEvent(21, 0.2, 4, 1.0))
    assert told >= with_one_more.get_epsilon(1e-3)


def test_the_rdp_accountant_refuses_cut_down_samples() -> None:
    with pytest.raises(UserError, match=r'privacy.accountant "rdp" knows no cut-down samples; use "pld"'):
        epsilon((Event(1.0, 0.1, 10, 1000, 150),), 1e-5, accountant="rdp")


@pytest.mark.parametrize("accountant", ["gdp", "gaussian", "prv", "PLD", ""])
def test_other_accountants_cannot_be_chosen(accountant: str) -> None:
    with pytest.raises(UserError, match=f"privacy.accountant `{accountant}` cannot be chosen.*there are pld and rdp"):
        epsilon((Event(1.0, 0.1, 1),), 1e-5, accountant=accountant)
    with pytest.raises(UserError, match="cannot be chosen"):
        calibrate_noise(1.0, 1e-5, 0.1, 1, accountant=accountant)


def test_other_relations_cannot_be_chosen() -> None:
    with pytest.raises(UserError, match=r"privacy.neighbours is `zero_out`; there are add_remove and replace_one"):
        epsilon((Event(1.0, 0.1, 1),), 1e-5, "zero_out")


def test_the_gdp_accountant_that_cannot_be_chosen_reads_below_the_truth() -> None:
    told = gdp.compute_eps_poisson(steps=1000, noise_multiplier=1.0, sample_rate=0.01, delta=1e-5)
    assert told == pytest.approx(1.62, abs=0.01)
    assert told < check_epsilon((Event(1.0, 0.01, 1000),), 1e-5).least <= epsilon((Event(1.0, 0.01, 1000),), 1e-5)


def test_the_gaussian_formula_that_cannot_be_chosen_reads_below_the_truth() -> None:
    noise = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    for accountant in accounting.ACCOUNTANTS:
        assert epsilon((Event(noise, 1.0, 1),), 1e-5, accountant=accountant) > 10.3
    assert calibrate_noise(10.0, 1e-5, 1.0, 1) > noise


def test_a_delta_below_what_the_arithmetic_can_vouch_for_is_refused_by_pld() -> None:
    event = Event(1.0, 0.01, 1_000_000)
    with pytest.raises(UserError, match=r'privacy.delta 1e-10 is smaller than .* use at least 2e-09, or .*"rdp"'):
        epsilon((event,), 1e-10)
    assert epsilon((event,), 1e-10, accountant="rdp") > epsilon((event,), 1e-8)


def test_what_the_rounding_of_the_transforms_may_hide_is_paid_for() -> None:
    plain = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0))
    plain.compose(dp_accounting.SelfComposedDpEvent(step, 1000))
    got = epsilon((Event(1.0, 0.01, 1000),), 5e-12)
    # A thousand transforms may be off by 1e-12.
    assert plain.get_epsilon(5e-12) < plain.get_epsilon(4e-12) < got < plain.get_epsilon(3.5e-12)


def test_next_to_no_noise_takes_no_memory_and_never_reads_low() -> None:
    assert epsilon((Event(0.001, 0.5, 5),), 1e-5) > 0.5e6
    assert epsilon((Event(1e-9, 0.5, 5),), 1e-5) == math.inf
    assert epsilon((Event(1.0, 1.0, 10**9),), 1e-5) >= 5e8


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
    ("target", "rate", "steps", "more"),
    [
        (8.0, 0.1, 24, {}),
        (1.0, 0.02, 100, {}),
        (3.0, 0.05, 1000, {}),
        (0.5, 1.0, 20, {}),
        (8.0, 0.1, 24, {"neighbours": "replace_one"}),
        (8.0, 0.1, 24, {"accountant": "rdp"}),
        (3.0, 0.2, 10, {"neighbours": "replace_one", "accountant": "rdp"}),
        (8.0, 0.1, 24, {"units": 1000, "max_batch": 140}),
    ],
)
def test_calibration_inverts_epsilon(target: float, rate: float, steps: int, more: dict[str, object]) -> None:
    noise = calibrate_noise(target, 1e-5, rate, steps, **more)  # type: ignore[arg-type]
    cut = {key: more[key] for key in ("units", "max_batch") if key in more}
    how = {key: more[key] for key in ("neighbours", "accountant") if key in more}

    def spent(noise: float) -> float:
        return epsilon((Event(noise, rate, steps, **cut),), 1e-5, **how)  # type: ignore[arg-type]

    assert spent(noise) <= target
    # It is the least one to 2e-3.
    assert spent(noise - 2.1e-3) > target


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
    search = accounting.brentq
    monkeypatch.setattr(accounting, "brentq", lambda *a, **k: search(*a, **k) - 0.01)
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


def test_more_noise_than_a_run_may_have_is_found_where_it_is_asked_for() -> None:
    with pytest.raises(UserError, match="even noise 100 gives"):
        calibrate_noise(1.0, 1e-5, 1.0, 1000)
    noise = calibrate_noise(1.0, 1e-5, 1.0, 1000, most=1e4)
    assert noise == pytest.approx(118, abs=1)
    assert epsilon((Event(noise, 1.0, 1000),), 1e-5) <= 1.0


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [
        (2.5, 2.0, "2.5"),
        (2.0004, 2.0, "2.0004"),
        (math.nextafter(2.0, 3.0), 2.0, "2.0000000000000004"),
        (math.inf, 8.0, "inf"),
    ],
)
def test_what_is_above_a_limit_never_looks_like_it(value: float, limit: float, text: str) -> None:
    assert above(value, limit) == text


@pytest.mark.parametrize("event", [Event(0.9, 0.05, 1), Event(1.1, 0.03, 1, units=400, max_batch=20)])
def test_the_losses_of_a_step_are_made_once_for_all_rounds_of_a_run(event: Event) -> None:
    accounting._step_losses.cache_clear()
    spent = [epsilon((replace(event, steps=steps),), 1e-4) for steps in (6, 12, 18)]
    made = accounting._step_losses.cache_info().misses
    assert made == (2 if event.max_batch else 1) and spent == sorted(spent)
    for steps, before in zip((6, 12, 18), spent, strict=True):
        accounting._step_losses.cache_clear()
        accounting._losses.cache_clear()
        assert accounting._epsilon_pld.__wrapped__((replace(event, steps=steps),), 1e-4, "add_remove") == before
