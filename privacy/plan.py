"""The privacy plan: one frozen object that the sampler, the engine, the ledger and the accountant all read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from .accounting import MIN_NOISE, Event, calibrate_noise, epsilon


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site promises for the steps it is about to take, and what it has already spent.

    ``units``: privacy units (records or patients) at the site; ``expected_batch``: units sampled a step on average;
    ``steps``: optimiser steps still to take; ``spent``: every noisy step taken on these data so far.

    Guarantee
    ---------
    Neighbours: data sets that differ by one added or removed unit. Trusted: the site alone. After ``steps`` more
    steps, each a sum of unit gradients clipped to L2 norm ``clip`` over a Poisson sample, plus Gaussian noise of std
    ``noise_multiplier * clip`` on every coordinate, all releases together are (``epsilon``, ``delta``)-DP.
    A plan that would break this does not construct: it raises :class:`UserError`.
    """

    unit: Literal["record", "patient"]
    units: int
    expected_batch: int
    clip: float
    noise_multiplier: float
    steps: int
    epsilon: float
    delta: float
    spent: tuple[Event, ...] = ()
    seeded_noise_not_private: bool = False

    sampler = "poisson"
    neighbours = "add_remove"
    accountant = "pld"

    def __post_init__(self) -> None:
        _check(self.unit, self.units, self.expected_batch, self.delta)
        if self.steps < 1:
            raise UserError("a privacy plan needs at least one step")
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise UserError(f"privacy.clip is {self.clip:g}; without a positive, finite bound there is no guarantee")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise UserError(f"privacy.epsilon is {self.epsilon:g}; it must be a positive, finite number")
        if not (self.noise_multiplier >= MIN_NOISE and math.isfinite(self.noise_multiplier)):
            raise UserError(
                f"privacy.noise_multiplier is {self.noise_multiplier:g}; below {MIN_NOISE:g} there is no guarantee "
                "worth the name (privacy.enabled = false says so openly)"
            )
        total = self.final_epsilon
        if total > self.epsilon * (1 + 1e-9):
            raise UserError(
                f"noise multiplier {self.noise_multiplier:g} spends epsilon {total:.3g} over the run, more than "
                f"privacy.epsilon {self.epsilon:g}; raise privacy.noise_multiplier, or leave it out to have it chosen"
            )

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch / self.units

    @property
    def final_epsilon(self) -> float:
        """Epsilon once all planned steps are taken."""
        return epsilon((*self.spent, self.event(self.steps)), self.delta)

    def event(self, steps: int) -> Event:
        """The ledger entry for ``steps`` steps of this plan."""
        return Event(self.noise_multiplier, self.sampling_rate, steps)

    @classmethod
    def for_run(cls, config: RunConfig, units: int, steps: int, spent: tuple[Event, ...] = ()) -> PrivacyPlan:
        """The plan of a site for the ``steps`` that remain of a run.

        The noise is the configured one or, where none is configured, the last one used as long as it keeps the
        promise, else the least that does: after a lost round, whose steps stay spent, the rest of the run takes more.
        """
        privacy, batch = config.privacy, config.train.batch_size
        _check(privacy.unit, units, batch, privacy.delta)
        rate = batch / units
        noise = privacy.noise_multiplier
        if not noise and spent and spent[-1].sampling_rate == rate:
            again = (*spent, Event(spent[-1].noise_multiplier, rate, steps))
            noise = spent[-1].noise_multiplier if epsilon(again, privacy.delta) <= privacy.epsilon else 0.0
        return cls(
            unit=privacy.unit,
            units=units,
            expected_batch=batch,
            clip=privacy.clip,
            noise_multiplier=noise or calibrate_noise(privacy.epsilon, privacy.delta, rate, steps, spent),
            steps=steps,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            spent=spent,
            seeded_noise_not_private=privacy.seeded_noise_not_private,
        )

    def statement(self, events: tuple[Event, ...]) -> PrivacyStatement:
        """:func:`statement` over ``events``, under the settings of this plan."""
        return _statement(self.unit, self.clip, self.delta, self.seeded_noise_not_private, events)


def statement(config: RunConfig, events: tuple[Event, ...]) -> PrivacyStatement:
    """What may be told of a site: the guarantee over ``events``, which are all noisy steps ever taken on its data."""
    privacy = config.privacy
    return _statement(privacy.unit, privacy.clip, privacy.delta, privacy.seeded_noise_not_private, events)


def _statement(unit: str, clip: float, delta: float, seeded: bool, events: tuple[Event, ...]) -> PrivacyStatement:
    return PrivacyStatement(
        enabled=True,
        unit=unit,
        epsilon=epsilon(events, delta),
        delta=delta,
        clip=clip,
        noise_multiplier=events[-1].noise_multiplier,
        sampling_rate=events[-1].sampling_rate,
        steps=sum(event.steps for event in events),
        sampler=PrivacyPlan.sampler,
        neighbours=PrivacyPlan.neighbours,
        accountant=PrivacyPlan.accountant,
        private_noise=not seeded,
    )


def _check(unit: str, units: int, batch: int, delta: float) -> None:
    if unit not in ("record", "patient"):
        raise UserError(f"privacy.unit is `{unit}`; there are record and patient")
    if units < 1:
        raise UserError(f"there is no {unit} to protect: the site has no training data")
    if batch < 1:
        raise UserError(f"train.batch_size is {batch}; it must be at least 1")
    if batch > units:
        raise UserError(
            f"train.batch_size {batch} is more than the site's {units} {unit}s; under DP it is the expected Poisson "
            "sample, so make it smaller than that"
        )
    if not delta > 0:
        raise UserError(f"privacy.delta is {delta:g}; it must be above 0")
    if delta >= 1 / units:
        raise UserError(
            f"privacy.delta {delta:g} is not below 1/{units}, the chance of naming one of the {units} {unit}s "
            "outright; make it smaller"
        )
