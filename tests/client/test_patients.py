"""Patients of 1 to 50 records: whoever comes or goes with all of them moves a step by no more than the bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedgraft.client import trainer
from fedgraft.client.resident import Resident, resident
from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import Sample, draw

SIZES = (1, 2, 50, 3, 7, 31, 1, 12, 4, 20)
CLIP = 0.02


def _groups() -> list[np.ndarray]:
    ends = np.cumsum(SIZES)
    return [np.arange(end - size, end) for size, end in zip(SIZES, ends, strict=True)]


def _config(tiny_federation: Any, most: int, gradient: str = "mean") -> RunConfig:
    return tiny_federation.private(  # type: ignore[no-any-return]
        **{
            "train.local_steps": 1,
            "train.lr": 1.0,
            "train.momentum": 0.0,
            "train.batch_size": 1,
            "train.micro_batch": 64,
            "privacy.records_per_patient": most,
            "privacy.patient_gradient": gradient,
        }
    )


class Site:
    """A site of these patients, all of whom are in the one step it takes, without noise."""

    def __init__(self, federation: Any, config: RunConfig) -> None:
        self.config, self.model = config, resident(config)
        rows = federation.rows[: sum(SIZES)]
        names = list(config.task.labels)
        self.examples = self.model.task.encode(
            [row["text"] for row in rows], [names.index(row["label"]) for row in rows], self.model.base.processor
        )
        # All records of a patient say the same, or they could cancel and hide an error.
        for group in _groups():
            for record in group[1:]:
                self.examples[record] = self.examples[group[0]]
        self.start = _shaken(self.model)

    def step(self, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> AdapterState:
        monkeypatch.setattr(trainer, "draw", lambda *args, **settings: sample)
        monkeypatch.setattr(RandomStream, "normal_like", lambda self, tensor: tensor.new_zeros(tensor.shape))
        plan = PrivacyPlan(
            unit="patient",
            units=len(SIZES),
            expected_batch=1,
            clip=CLIP,
            noise_multiplier=1.0,
            steps=1,
            epsilon=50.0,
            delta=1e-3,
            records_per_patient=self.config.privacy.records_per_patient,
            patient_gradient=self.config.privacy.patient_gradient,
        )
        trained = trainer.train(
            self.model, self.start, self.examples, _groups(), self.config, site="north", round=1, plan=plan
        )
        return trained.state


def _shaken(model: Resident) -> AdapterState:
    random = np.random.default_rng(0)
    spec = model.adapter.spec.with_policy("share", lambda t: True)
    fresh = model.adapter.read().with_spec(spec)
    return fresh.map(lambda array: (array + 0.1 * random.standard_normal(array.shape)).astype(array.dtype))


def _without(sample: Sample, patient: int) -> Sample:
    keep = np.flatnonzero(sample.units != patient)
    units = sample.units[keep]
    return Sample(sample.records[keep], units - (units > patient))


@pytest.mark.parametrize("gradient", ["mean", "sum"])
@pytest.mark.parametrize("most", [1, 4, 50])
def test_a_patient_more_or_less_moves_a_step_by_no_more_than_the_bound(
    tiny_federation: Any, monkeypatch: pytest.MonkeyPatch, most: int, gradient: str
) -> None:
    site = Site(tiny_federation, _config(tiny_federation, most, gradient))
    sample = draw(_groups(), 1.0, RandomStream.from_os(), records_per_unit=most)
    assert sample.sizes.tolist() == [min(size, most) for size in SIZES]
    whole = site.step(sample, monkeypatch)
    moves = [(whole - site.step(_without(sample, patient), monkeypatch)).norm() for patient in range(len(SIZES))]
    assert max(moves) <= CLIP * (1 + 1e-3)
    # The bound is reached, or the test could not tell a looser one.
    assert max(moves) > 0.9 * CLIP


def test_with_records_as_rows_and_no_cap_a_patient_breaks_the_bound(
    tiny_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cap and the joint clipping guard against: fifty clipped rows of one person add up to fifty bounds."""
    site = Site(tiny_federation, _config(tiny_federation, 1))
    everything = np.concatenate(_groups())
    owners = np.repeat(np.arange(len(SIZES)), SIZES)

    def rows(keep: np.ndarray) -> Sample:
        return Sample(everything[keep], np.arange(int(keep.sum())))

    whole = site.step(rows(np.ones(len(owners), dtype=bool)), monkeypatch)
    for patient, size in enumerate(SIZES):
        move = (whole - site.step(rows(owners != patient), monkeypatch)).norm()
        assert move == pytest.approx(size * CLIP, rel=0.02)
        assert (move <= CLIP * (1 + 1e-3)) == (size == 1)
    assert math.isclose(max(SIZES), 50)
