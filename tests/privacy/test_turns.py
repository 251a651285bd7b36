"""Whose turn it is and what steps cost, against a count of every unit's turns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event
from fedgraft.privacy.turns import Turns

CYCLIC = Turns("cyclic", 1000, 300)
BANDED = Turns("poisson", 1000, 100, bands=4)


def test_poisson_sampling_gives_everybody_a_chance_at_each_step() -> None:
    turns = Turns("poisson", 1000, 100)
    assert (turns.slots, turns.rate) == (1, 0.1)
    assert turns.event(1.5, 7) == Event(1.5, 0.1, 7)
    assert turns.begun(1.5, 40, 7, ()) == 7


def test_cut_down_sampling_tells_the_accountant_how() -> None:
    turns = Turns("truncated_poisson", 1000, 100, max_batch=130)
    assert turns.event(1.0, 3) == Event(1.0, 0.1, 3, 1000, 130)


def test_an_epoch_of_cyclic_steps_is_one_unsampled_step() -> None:
    assert (CYCLIC.slots, CYCLIC.rate) == (4, 1.0)
    assert CYCLIC.event(2.0, 3) == Event(2.0, 1.0, 3)


def test_bands_sample_within_slots_at_a_multiple_of_the_rate() -> None:
    assert (BANDED.slots, BANDED.rate) == (4, 0.4)
    assert BANDED.event(2.0, 3) == Event(2.0, 0.4, 3)


@pytest.mark.parametrize("turns", [CYCLIC, BANDED], ids=["cyclic", "banded"])
def test_what_is_paid_covers_every_units_turns_however_a_run_is_cut_into_rounds(turns: Turns) -> None:
    for rounds in itertools.product((1, 2, 3, 5, 8), repeat=3):
        taken, paid = 0, 0
        for steps in rounds:
            paid += turns.begun(1.0, taken, steps, (turns.event(1.0, max(paid, 1)),))
            taken += steps
            for slot in range(turns.slots):
                assert len(range(slot, taken, turns.slots)) <= paid
        assert paid == math.ceil(taken / turns.slots)


def test_a_round_within_an_epoch_that_is_paid_for_costs_nothing() -> None:
    assert CYCLIC.begun(1.0, 0, 2, ()) == 1
    assert CYCLIC.begun(1.0, 2, 2, (Event(1.0, 1.0, 1),)) == 0


def test_an_epoch_that_goes_on_under_less_noise_is_paid_for_again() -> None:
    spent = (Event(2.0, 1.0, 1), Event(1.0, 1.0, 3), Event(9.0, 0.5, 1))
    assert CYCLIC.begun(2.0, 2, 2, spent) == 0
    assert CYCLIC.begun(1.9, 2, 2, spent) == 1
    assert CYCLIC.begun(1.9, 4, 2, spent) == 1  # the next epoch, once
    # Nothing was ever paid: neither was the epoch.
    assert CYCLIC.begun(5.0, 2, 2, (Event(9.0, 0.5, 1),)) == 1


def test_the_last_noise_and_the_most_are_those_of_steps_alike() -> None:
    spent = (Event(2.0, 1.0, 1), Event(1.0, 1.0, 3), Event(9.0, 0.5, 1), Event(8.0, 1.0, 1, 1000, 300))
    assert CYCLIC.last(spent) == 1.0
    assert CYCLIC.paid(spent) == 2.0
    assert CYCLIC.last(()) is None
    assert CYCLIC.paid(()) == math.inf


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sampler": "shuffle"}, "privacy.sampler is `shuffle`"),
        ({"max_batch": 200}, "privacy.max_batch and privacy.sampler"),
        ({"sampler": "truncated_poisson"}, "privacy.max_batch and privacy.sampler"),
        ({"sampler": "truncated_poisson", "max_batch": 99}, "privacy.max_batch 99 is below train.batch_size 100"),
        ({"sampler": "cyclic", "max_batch": 200}, "privacy.max_batch and privacy.sampler"),
        ({"bands": 0}, "privacy.bands is 0"),
        ({"sampler": "truncated_poisson", "max_batch": 200, "bands": 2}, "not for cut-down samples"),
        ({"sampler": "cyclic", "bands": 11}, "privacy.bands 11 is more than the 10 steps"),
        ({"bands": 11}, "privacy.bands 11 times train.batch_size 100 is more than the site's 1000 units"),
    ],
)
def test_what_contradicts_itself_or_has_no_proof_does_not_construct(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        Turns(**{"sampler": "poisson", "units": 1000, "expected_batch": 100, **settings})
    assert says in str(refusal.value)


def test_bands_may_fill_the_epoch_and_the_site() -> None:
    assert Turns("cyclic", 1000, 100, bands=10).slots == 10
    assert Turns("poisson", 1000, 100, bands=10).rate == 1.0
