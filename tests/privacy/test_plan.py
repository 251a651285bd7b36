"""A plan that would break its promise does not construct; a plan that is made for a run keeps it, also after losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import norm

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import MIN_NOISE, Event, calibrate_noise, epsilon
from fedgraft.privacy.correlated import CorrelatedNoise
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan, statement

PLAN = PrivacyPlan(
    unit="patient",
    units=1000,
    expected_batch=100,
    clip=1.0,
    noise_multiplier=1.0,
    steps=20,
    epsilon=8.0,
    delta=1e-5,
)


CUT = {"sampler": "truncated_poisson", "max_batch": 150}


def _config(**privacy: Any) -> RunConfig:
    return parse_config(
        {
            "model": "somewhere",
            "data": {"sites": ["a"]},
            "train": {"batch_size": 100},
            "privacy": {"epsilon": 3.0, "delta": 1e-5, "unit": "patient", **privacy},
        }
    )


def test_the_plan_says_what_it_spends() -> None:
    assert PLAN.sampling_rate == 0.1
    assert PLAN.event(7) == Event(1.0, 0.1, 7)
    assert PLAN.final_epsilon == epsilon((Event(1.0, 0.1, 20),), 1e-5) < 8.0
    spent = (Event(1.0, 0.1, 5), Event(2.0, 0.2, 3))
    assert replace(PLAN, spent=spent).final_epsilon == epsilon((*spent, Event(1.0, 0.1, 20)), 1e-5) > PLAN.final_epsilon


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unit": "family"}, "privacy.unit"),
        ({"units": 0}, "no patient to protect"),
        ({"expected_batch": 0}, "train.batch_size"),
        ({"expected_batch": 1001}, "train.batch_size 1001 is more than the site's 1000 patients"),
        ({"delta": 1e-3}, "privacy.delta 0.001 is not below 1/1000"),
        ({"delta": 0.5}, "privacy.delta"),
        ({"delta": 0.0}, "privacy.delta"),
        ({"delta": -1e-5}, "privacy.delta"),
        ({"delta": math.nan}, "privacy.delta"),
        ({"steps": 0}, "at least one step"),
        ({"clip": 0.0}, "privacy.clip"),
        ({"clip": -1.0}, "privacy.clip"),
        ({"clip": math.nan}, "privacy.clip"),
        ({"clip": math.inf}, "privacy.clip"),
        ({"epsilon": 0.0}, "privacy.epsilon"),
        ({"epsilon": math.nan}, "privacy.epsilon"),
        ({"epsilon": math.inf}, "privacy.epsilon"),
        ({"noise_multiplier": 0.0}, "privacy.enabled = false"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": MIN_NOISE * 0.99}, "noise_multiplier"),
        ({"noise_multiplier": 0.5}, "spends epsilon"),
        ({"epsilon": 1.0}, "spends epsilon"),
        ({"epsilon": PLAN.final_epsilon * (1 - 1e-6)}, "spends epsilon"),
        ({"spent": (Event(0.6, 0.1, 20),)}, "spends epsilon"),
        ({"first_step": -1}, "at least one step"),
        ({"neighbours": "zero_out"}, "privacy.neighbours"),
        ({"accountant": "gdp"}, "privacy.accountant `gdp` cannot be chosen"),
        ({"sampler": "shuffle"}, "privacy.sampler"),
        ({"sampler": "truncated_poisson"}, "privacy.max_batch"),
        ({"max_batch": 150}, "privacy.max_batch"),
        ({**CUT, "max_batch": 99}, "privacy.max_batch 99 is below train.batch_size 100"),
        ({**CUT, "accountant": "rdp"}, 'privacy.accountant "rdp" knows no cut-down samples'),
        ({**CUT, "bands": 2}, "not for cut-down samples"),
        ({"bands": 0}, "privacy.bands is 0"),
        ({"bands": 11}, "privacy.bands 11 times train.batch_size 100"),
        ({"sampler": "cyclic", "bands": 11}, "privacy.bands 11 is more than the 10 steps"),
        ({"bands": 2, "clip_quantile": 0.5}, "needs a fixed clip"),
        ({"bands": 2, "neighbours": "replace_one"}, 'privacy.neighbours "add_remove" only'),
        ({"clip_quantile": 1.0}, "privacy.clip_quantile is 1"),
        ({"clip_quantile": -0.1}, "privacy.clip_quantile"),
        ({"clip_rate": 0.0}, "privacy.clip_rate"),
        ({"clip_rate": math.nan}, "privacy.clip_rate"),
        ({"records_per_patient": 0}, "privacy.records_per_patient"),
        ({"records_per_patient": 2, "unit": "record"}, "privacy.records_per_patient is 2"),
        ({"patient_gradient": "median"}, "privacy.patient_gradient"),
        ({"neighbours": "replace_one", "epsilon": PLAN.final_epsilon}, "spends epsilon"),
        ({"accountant": "rdp", "epsilon": PLAN.final_epsilon}, "spends epsilon"),
    ],
)
def test_a_plan_that_would_break_its_promise_does_not_construct(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        replace(PLAN, **change)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_budget_that_is_met_exactly_is_kept() -> None:
    assert replace(PLAN, epsilon=PLAN.final_epsilon).final_epsilon == PLAN.final_epsilon


def test_the_whole_site_as_one_batch_is_allowed() -> None:
    plan = replace(PLAN, expected_batch=1000, noise_multiplier=5.0, epsilon=30.0)
    assert plan.sampling_rate == 1.0


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PLAN.noise_multiplier = 0.1  # type: ignore[misc]


def test_for_run_takes_the_least_noise_that_keeps_the_promise() -> None:
    plan = PrivacyPlan.for_run(_config(), units=1000, steps=30)
    assert (plan.unit, plan.units, plan.expected_batch, plan.clip, plan.steps) == ("patient", 1000, 100, 1.0, 30)
    assert 2.97 < plan.final_epsilon <= 3.0


def test_for_run_keeps_a_configured_noise_or_refuses_it() -> None:
    assert PrivacyPlan.for_run(_config(noise_multiplier=2.0), units=1000, steps=30).noise_multiplier == 2.0
    with pytest.raises(UserError, match=r"noise multiplier 0\.5 spends epsilon"):
        PrivacyPlan.for_run(_config(noise_multiplier=0.5), units=1000, steps=30)


def test_for_run_refuses_a_budget_out_of_reach() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        PrivacyPlan.for_run(_config(epsilon=0.001), units=1000, steps=3000)
    with pytest.raises(UserError, match="after what was already spent"):
        PrivacyPlan.for_run(_config(), units=1000, steps=1, spent=(Event(0.5, 0.1, 50),))


@pytest.mark.parametrize(
    ("config", "units", "says"),
    [
        (_config(), 0, "no patient to protect"),
        (_config(), 99, "train.batch_size 100 is more than the site's 99 patients"),
        (_config(delta=1e-3), 1000, "privacy.delta 0.001 is not below 1/1000"),
    ],
)
def test_for_run_refuses_a_site_that_is_too_small(config: RunConfig, units: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PrivacyPlan.for_run(config, units=units, steps=5)


def test_an_undisturbed_run_keeps_its_first_noise_and_ends_within_its_budget() -> None:
    config, rounds, local = _config(), 5, 6
    spent: tuple[Event, ...] = ()
    noises = []
    for round_ in range(rounds):
        plan = PrivacyPlan.for_run(config, units=1000, steps=(rounds - round_) * local, spent=spent)
        noises.append(plan.noise_multiplier)
        spent = (*spent, plan.event(local))
    assert len(set(noises)) == 1
    assert 2.97 < epsilon(spent, 1e-5) <= 3.0


def test_rounds_lost_after_their_budget_was_reserved_never_overspend() -> None:
    """A round that is reserved and then repeated makes the rest of the run take more noise, never more epsilon."""
    config, rounds, local = _config(), 5, 6
    spent: tuple[Event, ...] = ()
    noises = []
    for round_ in (0, 1, 1, 1, 2, 3, 4):
        plan = PrivacyPlan.for_run(config, units=1000, steps=(rounds - round_) * local, spent=spent)
        assert plan.final_epsilon <= 3.0
        noises.append(plan.noise_multiplier)
        spent = (*spent, plan.event(local))
        assert epsilon(spent, 1e-5) <= 3.0
    assert noises[0] == noises[1] < noises[2] < noises[3]
    # What is left of the run keeps the noise that its last repetition asked for.
    assert noises[3] == noises[4] == noises[5] == noises[6]


def test_the_last_noise_is_not_kept_under_another_sampling_rate() -> None:
    plan = PrivacyPlan.for_run(_config(), units=800, steps=30, spent=(Event(5.0, 0.1, 6),))
    assert plan.noise_multiplier < 5.0
    assert 2.97 < plan.final_epsilon <= 3.0


def test_the_statement_counts_every_event() -> None:
    spent = (Event(1.0, 0.1, 6), Event(1.2, 0.1, 6))
    told = PLAN.statement(spent)
    assert told.enabled and told.private_noise
    assert (told.unit, told.delta, told.clip) == ("patient", 1e-5, 1.0)
    assert (told.noise_multiplier, told.sampling_rate, told.steps) == (1.2, 0.1, 12)
    assert (told.sampler, told.neighbours, told.accountant) == ("poisson", "add_remove", "pld")
    assert told.epsilon == epsilon(spent, 1e-5)
    assert statement(_config(), spent) == told


def test_a_seeded_run_says_that_its_noise_is_not_private() -> None:
    config = _config(seeded_noise_not_private=True)
    plan = PrivacyPlan.for_run(config, units=1000, steps=5)
    assert plan.seeded_noise_not_private
    assert not plan.statement((plan.event(5),)).private_noise
    assert not statement(config, (plan.event(5),)).private_noise


def test_an_overspent_budget_never_looks_as_if_it_were_kept() -> None:
    with pytest.raises(
        UserError, match=r"spends epsilon (\S+) over the run, more than privacy.epsilon (\S+);"
    ) as refusal:
        replace(PLAN, epsilon=PLAN.final_epsilon * (1 - 1e-7))
    words = str(refusal.value).split()
    assert words[words.index("epsilon") + 1] != words[words.index("privacy.epsilon") + 1].rstrip(";")


@pytest.mark.parametrize(
    ("change", "event"),
    [
        (CUT, Event(1.0, 0.1, 7, 1000, 150)),
        ({"sampler": "cyclic", "noise_multiplier": 3.0}, Event(3.0, 1.0, 1)),
        ({"sampler": "cyclic", "bands": 10, "noise_multiplier": 3.0}, Event(3.0, 1.0, 1)),
        ({"bands": 4}, Event(1.0, 0.4, 2)),
        ({"clip_quantile": 0.5}, Event(1.0, 0.1, 7)),
        ({"records_per_patient": 5, "patient_gradient": "sum"}, Event(1.0, 0.1, 7)),
    ],
    ids=str,
)
def test_every_sampler_has_its_event(change: dict[str, Any], event: Event) -> None:
    plan = replace(PLAN, epsilon=20.0, **change)
    assert plan.event(7) == event
    assert plan.events(0, 7) == (event,)
    assert plan.final_epsilon == epsilon(plan.events(0, plan.steps), 1e-5)


def test_the_plan_tells_the_sampler_whose_turn_it_is() -> None:
    assert (PLAN.slots, PLAN.rate_within_slot, PLAN.slot(17)) == (1, 0.1, 0)
    cyclic = replace(PLAN, sampler="cyclic", noise_multiplier=3.0)
    assert (cyclic.slots, cyclic.rate_within_slot, [cyclic.slot(step) for step in (0, 9, 10, 23)]) == (
        10,
        1.0,
        [0, 9, 0, 3],
    )
    banded = replace(PLAN, bands=4, epsilon=20.0)
    assert (banded.slots, banded.rate_within_slot, banded.slot(6)) == (4, 0.4, 2)


@pytest.mark.parametrize("change", [{"sampler": "cyclic"}, {"sampler": "cyclic", "bands": 10}, {"bands": 10}], ids=str)
@pytest.mark.parametrize(("neighbours", "reach"), [("add_remove", 1), ("replace_one", 2)])
def test_a_unit_with_k_sure_turns_costs_a_gaussian_of_sensitivity_root_k(
    change: dict[str, Any], neighbours: str, reach: int
) -> None:
    """Three epochs were begun; with bands that fill the site, Poisson sampling within a slot takes everybody too."""
    settings = {**change, "neighbours": neighbours, "noise_multiplier": 4.0, "steps": 21, "epsilon": 50.0}
    if "sampler" not in change and neighbours == "replace_one":
        with pytest.raises(UserError, match="add_remove"):
            replace(PLAN, **settings)
        return
    spent = replace(PLAN, **settings).final_epsilon
    mu = reach * math.sqrt(3) / 4.0
    left = norm.cdf(mu / 2 - spent / mu) - math.exp(spent) * norm.cdf(-mu / 2 - spent / mu)
    assert left == pytest.approx(1e-5, rel=1e-2)
    assert left <= 1e-5


def test_an_epoch_is_paid_for_once_over_rounds_that_cut_it() -> None:
    plan = replace(PLAN, sampler="cyclic", noise_multiplier=3.0, epsilon=20.0)
    assert plan.events(0, 6) == (Event(3.0, 1.0, 1),)
    later = replace(plan, spent=plan.events(0, 6), first_step=6, steps=6)
    assert later.events(6, 4) == ()
    assert later.events(6, 6) == (Event(3.0, 1.0, 1),)
    # Under less noise the epoch that is running is paid for again.
    assert replace(later, noise_multiplier=2.9).events(6, 4) == (Event(2.9, 1.0, 1),)
    assert replace(later, noise_multiplier=2.9).event(4) == Event(2.9, 1.0, 1)


def test_the_count_and_the_gradient_together_are_one_gaussian_of_the_plans_noise() -> None:
    plan = replace(PLAN, clip_quantile=0.5)
    assert plan.count_noise == 5.0  # a twentieth of the batch
    # A unit moves the gradient by the clip at most, and the count (+-1/2) by 1/2.
    together = (1 / plan.gradient_noise**2 + 0.5**2 / plan.count_noise**2) ** -0.5
    assert together == pytest.approx(plan.noise_multiplier, rel=1e-12)
    assert PLAN.gradient_noise == PLAN.noise_multiplier and PLAN.count_noise == 0.0


@pytest.mark.parametrize(("batch", "noise"), [(1, 0.5), (10, 3.0), (100, 20.0), (999, 0.7)])
def test_the_count_never_takes_more_than_a_few_percent_from_the_gradient(batch: int, noise: float) -> None:
    plan = replace(PLAN, expected_batch=batch, noise_multiplier=noise, clip_quantile=0.5, epsilon=5e3)
    assert noise < plan.gradient_noise <= 1.04 * noise
    assert (1 / plan.gradient_noise**2 + 0.5**2 / plan.count_noise**2) ** -0.5 == pytest.approx(noise, rel=1e-12)


def test_noise_comes_from_the_stream_or_from_the_runs_key() -> None:
    stream = RandomStream.from_os()
    assert PLAN.noise_for(stream, 3) is stream
    banded, key, like = replace(PLAN, bands=4, epsilon=20.0), bytes(range(32)), torch.zeros(6)
    kept = banded.correlated(key)
    rows = [banded.noise_for(kept, step).normal_like(like) for step in range(5)]
    assert torch.equal(banded.noise_for(key, 4).normal_like(like), rows[4])
    assert torch.equal(CorrelatedNoise(key, 4).at(4).normal_like(like), rows[4])
    with pytest.raises(ValueError, match="drawn from the run's key"):
        banded.noise_for(stream, 3)
    with pytest.raises(ValueError, match="noise of 4 bands for a plan of 1"):
        PLAN.noise_for(kept, 9)


@pytest.mark.parametrize(
    "privacy",
    [
        {"neighbours": "replace_one"},
        {"accountant": "rdp"},
        {"sampler": "truncated_poisson", "max_batch": 140},
        {"sampler": "cyclic"},
        {"sampler": "cyclic", "bands": 10, "neighbours": "replace_one"},
        {"bands": 5},
        {"clip_quantile": 0.5, "records_per_patient": 4, "patient_gradient": "sum"},
    ],
    ids=str,
)
def test_for_run_follows_the_configuration(privacy: dict[str, Any]) -> None:
    config = _config(**privacy)
    plan = PrivacyPlan.for_run(config, units=1000, steps=30)
    for key, value in privacy.items():
        assert getattr(plan, key) == value
    assert 2.95 < plan.final_epsilon <= 3.0
    spent = plan.events(0, 6)
    assert statement(config, spent) == plan.statement(spent)
    told = plan.statement(spent)
    assert (told.sampler, told.neighbours, told.accountant) == (plan.sampler, plan.neighbours, plan.accountant)
    assert told.epsilon == epsilon(spent, 1e-5, plan.neighbours, plan.accountant)


@pytest.mark.parametrize("privacy", [{"sampler": "cyclic", "bands": 4}, {"bands": 4}], ids=str)
@pytest.mark.parametrize("lost", [(), (2,), (1, 1, 3)])
def test_rounds_that_cut_epochs_end_within_the_budget_also_after_losses(
    privacy: dict[str, Any], lost: tuple[int, ...]
) -> None:
    """Steps that were reserved are never taken again: a lost round is followed by as many new ones."""
    config, local = _config(**privacy), 6
    spent: tuple[Event, ...] = ()
    first = 0
    for round_ in sorted((*range(5), *lost)):
        plan = PrivacyPlan.for_run(config, 1000, (5 - round_) * local, spent, first)
        assert plan.final_epsilon <= 3.0
        spent, first = (*spent, *plan.events(first, local)), first + local
        assert epsilon(spent, 1e-5) <= 3.0
    assert epsilon(spent, 1e-5) > 2.9


def test_a_noise_far_larger_than_needed_is_not_kept() -> None:
    plan = PrivacyPlan.for_run(_config(), units=1000, steps=30, spent=(Event(20.0, 0.1, 6),))
    assert plan.noise_multiplier < 3.0
    assert 2.97 < plan.final_epsilon <= 3.0


def test_a_noise_a_little_larger_than_needed_is_kept() -> None:
    least = calibrate_noise(3.0, 1e-5, 0.1, 36)
    plan = PrivacyPlan.for_run(_config(), units=1000, steps=30, spent=(Event(least * 1.1, 0.1, 6),))
    assert plan.noise_multiplier == least * 1.1


def test_an_epoch_that_was_begun_goes_on_under_its_noise_or_is_paid_for_again() -> None:
    config = _config(sampler="cyclic")
    generous = (Event(60.0, 1.0, 1),)
    plan = PrivacyPlan.for_run(config, 1000, 20, generous, first_step=4)
    assert plan.noise_multiplier < 60.0 and plan.final_epsilon <= 3.0
    assert plan.events(4, 6) == (Event(plan.noise_multiplier, 1.0, 1),)
    # The whole of it is what remains, and nothing more can be paid: it goes on as it began.
    spent = (Event(3.0, 1.0, 1), Event(2.0, 0.5, 4))
    budget = epsilon(spent, 1e-5)
    rest = PrivacyPlan.for_run(_config(sampler="cyclic", epsilon=budget), 1000, 6, spent, first_step=4)
    assert rest.noise_multiplier == 3.0 and rest.events(4, 6) == () and rest.final_epsilon == budget
