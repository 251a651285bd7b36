"""A plan that would break its promise does not construct; a plan that is made for a run keeps it, also after losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import MIN_NOISE, Event, epsilon
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
