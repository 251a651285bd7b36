"""The privacy plan: one frozen object that the sampler, the engine, the ledger and the accountant all read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..core.config import PrivacyConfig, RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from .accounting import MIN_NOISE, Event, above, calibrate_noise, epsilon, require_known, rough_epsilon
from .turns import Turns

if TYPE_CHECKING:
    from .clipping import Noise
    from .correlated import CorrelatedNoise
    from .noise import RandomStream

# The last noise is used again unless so many times less would do.
_NEAR = 1.25
# A run does not go on with so many times the noise that it had.
_FAR = 5.0


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site promises for the steps it is about to take, and what it has already spent.

    ``units``: privacy units (records or patients) at the site, taken as public; ``expected_batch``: units a step on
    average; ``steps``: optimiser steps still to take; ``spent``: every noisy step taken on these data so far;
    ``first_step``: steps of this run that the ledger already holds, taken or lost.

    A trainer takes step number ``first_step``, ``first_step + 1``, ... like this: the candidates are the units of the
    step's :meth:`slot` (a unit's slot, 0 to ``slots`` - 1, follows from a hash of its own key alone, so that adding a
    unit moves no other); each takes part with probability ``rate_within_slot``, cut down to ``max_batch`` where that
    is set, and gives at most ``records_per_patient`` records; each unit's gradient is clipped once to norm ``clip``;
    the release takes :attr:`gradient_noise` (not ``noise_multiplier``), ``expected_batch`` and :meth:`noise_for`.

    Guarantee
    ---------
    Neighbours (``neighbours``): data sets that differ by one unit added or removed (``add_remove``), or by one unit
    replaced by any other (``replace_one``; twice as visible). Trusted: the site alone. After ``steps`` more steps, all
    releases together are (``epsilon``, ``delta``)-DP. What a patient's records are summed to (``patient_gradient``)
    changes nothing: the patient's total is clipped once. By sampler:

    - ``poisson``, ``truncated_poisson`` with independent noise: sampled Gaussian steps, see
      :func:`fedgraft.privacy.accounting.epsilon`;
    - ``poisson`` with ``bands`` > 1: a slot's units are sampled at rate bands x expected batch / units at every
      ``bands``-th step. A unit's steps move disjoint rows, so T steps cost ceil(T / bands) sampled steps at that rate
      (Choquette-Choo et al. 2023, arXiv:2306.08153, theorem 4). Add/remove only: a replaced unit may change its slot;
    - ``cyclic``: each unit takes part in every ``slots``-th step, surely. An epoch of ``slots`` steps costs one
      unsampled step, with ``bands`` up to ``slots`` (:class:`fedgraft.privacy.correlated.CorrelatedNoise`), and under
      ``replace_one`` wherever the other unit's slot is: each of the two moves the release by sqrt(epochs) at most.

    With ``clip_quantile``, each step also releases how many units were within the clip, noised (:attr:`count_noise`):
    the pair is one Gaussian of ``noise_multiplier`` (Andrew et al. 2021, theorem 1).

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
    neighbours: Literal["add_remove", "replace_one"] = "add_remove"
    accountant: Literal["pld", "rdp"] = "pld"
    sampler: Literal["poisson", "truncated_poisson", "cyclic"] = "poisson"
    max_batch: int = 0
    bands: int = 1
    clip_quantile: float = 0.0
    clip_rate: float = 0.2
    records_per_patient: int = 1
    patient_gradient: Literal["mean", "sum"] = "mean"
    first_step: int = 0

    def __post_init__(self) -> None:
        _check_size(self.unit, self.units, self.expected_batch, self.delta)
        if self.steps < 1 or self.first_step < 0:
            raise UserError("a privacy plan needs at least one step, and none before the first")
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise UserError(f"privacy.clip is {self.clip:g}; without a positive, finite bound there is no guarantee")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise UserError(f"privacy.epsilon is {self.epsilon:g}; it must be a positive, finite number")
        if not (self.noise_multiplier >= MIN_NOISE and math.isfinite(self.noise_multiplier)):
            raise UserError(
                f"privacy.noise_multiplier is {self.noise_multiplier:g}; below {MIN_NOISE:g} there is no guarantee "
                "worth the name (privacy.enabled = false says so openly)"
            )
        require_known(self.neighbours, self.accountant)
        _ = self.turns  # does not construct where it contradicts itself
        self._check_proved()
        self._check_unit()
        if not (0 <= self.clip_quantile < 1 and self.clip_rate > 0 and math.isfinite(self.clip_rate)):
            raise UserError(
                f"privacy.clip_quantile is {self.clip_quantile:g} and privacy.clip_rate {self.clip_rate:g}; the first "
                "is in [0, 1), the second positive and finite"
            )
        total = self.final_epsilon
        if not total <= self.epsilon * (1 + 1e-9):
            raise UserError(
                f"noise multiplier {self.noise_multiplier:g} spends epsilon {above(total, self.epsilon)} over the run, "
                f"more than privacy.epsilon {self.epsilon:g}; raise privacy.noise_multiplier, or leave it out to have "
                "it chosen"
            )

    def _check_proved(self) -> None:
        """Each setting may be right alone; these together have no proof."""
        if self.max_batch and self.accountant == "rdp":
            raise UserError(
                'privacy.accountant "rdp" knows no cut-down samples; use "pld" with privacy.sampler = '
                '"truncated_poisson"'
            )
        if self.bands > 1 and self.clip_quantile:
            raise UserError(
                "privacy.bands above 1 needs a fixed clip: noise that later steps take back must keep its size; set "
                "privacy.clip_quantile = 0"
            )
        if self.bands > 1 and self.sampler == "poisson" and self.neighbours == "replace_one":
            raise UserError(
                'privacy.bands above 1 with privacy.sampler "poisson" is proved for privacy.neighbours "add_remove" '
                "only"
            )

    def _check_unit(self) -> None:
        if self.records_per_patient < 1 or (self.records_per_patient > 1 and self.unit != "patient"):
            raise UserError(
                f"privacy.records_per_patient is {self.records_per_patient}; it is at least 1, and more needs "
                'privacy.unit = "patient"'
            )
        if self.patient_gradient not in ("mean", "sum"):
            raise UserError(f"privacy.patient_gradient is `{self.patient_gradient}`; there are mean and sum")

    @property
    def sampling_rate(self) -> float:
        """The share of all units that a step sees on average."""
        return self.expected_batch / self.units

    @property
    def turns(self) -> Turns:
        return Turns(self.sampler, self.units, self.expected_batch, self.max_batch, self.bands)

    @property
    def slots(self) -> int:
        """Into how many slots the units are dealt, whose turns come one step after another."""
        return self.turns.slots

    @property
    def rate_within_slot(self) -> float:
        """The chance of each unit of the slot whose turn it is."""
        return self.turns.rate

    def slot(self, step: int) -> int:
        """The slot whose turn ``step`` is, counted from the run's first step."""
        return step % self.slots

    @property
    def count_noise(self) -> float:
        """Std of the noise on the number of units within the clip (each counted as +-1/2); 0 for a fixed clip.

        A twentieth of the expected batch (Andrew et al. 2021), or more where that would ask more than 4 % more of the
        gradient's noise.
        """
        return max(self.expected_batch / 20, 2 * self.noise_multiplier) if self.clip_quantile else 0.0

    @property
    def gradient_noise(self) -> float:
        """Std over clip of the noise on the gradient: with the count's it comes to ``noise_multiplier``.

        (z^-2 - (2 count_noise)^-2)^(-1/2), Andrew et al. 2021, theorem 1.
        """
        if not self.clip_quantile:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5

    @property
    def final_epsilon(self) -> float:
        """Epsilon once all planned steps are taken."""
        events = (*self.spent, *self.events(self.first_step, self.steps))
        return epsilon(events, self.delta, self.neighbours, self.accountant)

    def event(self, steps: int) -> Event:
        """What ``steps`` steps cost at most, from whichever step on."""
        return self.events(0, steps)[0]

    def events(self, first_step: int, steps: int) -> tuple[Event, ...]:
        """What the ledger must hold before the steps ``first_step`` to ``first_step + steps - 1`` of the run.

        One event, or none where all of them lie in an epoch (or block of bands) that is paid for. One that was begun
        under more noise than is planned now is paid for again.
        """
        turns = self.turns.begun(self.noise_multiplier, first_step, steps, self.spent)
        return (self.turns.event(self.noise_multiplier, turns),) if turns else ()

    def noise_for(self, source: RandomStream | CorrelatedNoise | bytes, step: int) -> Noise:
        """What the engine's release takes as the noise of ``step``, counted from the run's first step.

        ``source``: a :class:`RandomStream`, or with ``bands`` above 1 the run's key or, which spares drawing all rows
        before this one anew, what :meth:`correlated` made of it.
        """
        from .correlated import CorrelatedNoise

        if isinstance(source, bytes):
            source = CorrelatedNoise(source, self.bands)
        if isinstance(source, CorrelatedNoise):
            if source.bands != self.bands:
                raise ValueError(f"noise of {source.bands} bands for a plan of {self.bands}")
            return source.at(step)
        if self.bands > 1:
            raise ValueError("correlated noise is drawn from the run's key, not from a stream")
        return source

    def correlated(self, key: bytes) -> CorrelatedNoise:
        """The noise of a run with ``bands`` above 1, from the run's key (:func:`correlated.site_key`)."""
        from .correlated import CorrelatedNoise

        return CorrelatedNoise(key, self.bands)

    @classmethod
    def for_run(
        cls, config: RunConfig, units: int, steps: int, spent: tuple[Event, ...] = (), first_step: int = 0
    ) -> PrivacyPlan:
        """The plan of a site for the ``steps`` that remain of a run, of which the ledger already holds ``first_step``.

        The noise is the configured one or, where none is configured, the last one used, as long as it keeps the
        promise and not much less would do; else the least that does: after a lost round, whose steps stay spent, the
        rest of the run takes more. Raises :class:`UserError` where it would have to take far more.
        """
        privacy, batch = config.privacy, config.train.batch_size
        _check_size(privacy.unit, units, batch, privacy.delta)
        turns = Turns(privacy.sampler, units, batch, privacy.max_batch, privacy.bands)
        return cls(
            unit=privacy.unit,
            units=units,
            expected_batch=batch,
            clip=privacy.clip,
            noise_multiplier=privacy.noise_multiplier or _noise(config, turns, first_step, steps, spent),
            steps=steps,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            spent=spent,
            seeded_noise_not_private=privacy.seeded_noise_not_private,
            neighbours=privacy.neighbours,
            accountant=privacy.accountant,
            sampler=privacy.sampler,
            max_batch=privacy.max_batch,
            bands=privacy.bands,
            clip_quantile=privacy.clip_quantile,
            clip_rate=privacy.clip_rate,
            records_per_patient=privacy.records_per_patient,
            patient_gradient=privacy.patient_gradient,
            first_step=first_step,
        )

    def statement(self, events: tuple[Event, ...]) -> PrivacyStatement:
        """What may be told of a site: the guarantee over ``events``, under the settings of this plan."""
        return _statement(self, events)


def statement(config: RunConfig, events: tuple[Event, ...]) -> PrivacyStatement:
    """What may be told of a site: the guarantee over ``events``, which are all noisy steps ever taken on its data."""
    return _statement(config.privacy, events)


def _statement(settings: PrivacyPlan | PrivacyConfig, events: tuple[Event, ...]) -> PrivacyStatement:
    return PrivacyStatement(
        enabled=True,
        unit=settings.unit,
        epsilon=epsilon(events, settings.delta, settings.neighbours, settings.accountant),
        delta=settings.delta,
        clip=settings.clip,
        noise_multiplier=events[-1].noise_multiplier,
        sampling_rate=events[-1].sampling_rate,
        steps=sum(event.steps for event in events),
        sampler=settings.sampler,
        neighbours=settings.neighbours,
        accountant=settings.accountant,
        private_noise=not settings.seeded_noise_not_private,
    )


def _noise(config: RunConfig, turns: Turns, first_step: int, steps: int, spent: tuple[Event, ...]) -> float:
    """The noise for the rest of a run; see :meth:`PrivacyPlan.for_run`."""
    privacy = config.privacy

    def keeps(noise: float, spends: Callable[..., float] = epsilon) -> bool:
        left = turns.begun(noise, first_step, steps, spent)
        events = (*spent, turns.event(noise, left)) if left else spent
        return spends(events, privacy.delta, privacy.neighbours, privacy.accountant) <= privacy.epsilon

    def least(left: int) -> float:
        if not left:
            return MIN_NOISE
        event = turns.event(1.0, left)
        return calibrate_noise(
            privacy.epsilon,
            privacy.delta,
            event.sampling_rate,
            event.steps,
            spent,
            privacy.neighbours,
            privacy.accountant,
            event.units,
            event.max_batch,
        )

    last = turns.last(spent)
    if last is not None and keeps(last) and (last / _NEAR < MIN_NOISE or not keeps(last / _NEAR, rough_epsilon)):
        return last
    paid = turns.paid(spent)
    noise = least(turns.begun(math.inf, first_step, steps, spent))
    if first_step % turns.slots and noise < paid:
        # Going on under less noise pays for the turns that were begun once more: the smaller of the two will do.
        try:
            noise = min(paid, least(turns.begun(0.0, first_step, steps, spent)))
        except UserError:
            if math.isinf(paid):
                raise
            noise = paid
    if first_step and last is not None and noise > _FAR * last:
        raise UserError(
            f"privacy.epsilon {privacy.epsilon:g} leaves so little after what was already spent that the rest of the "
            f"run would take {noise / last:.0f} times the noise of the steps before, and undo what they learned"
        )
    return noise


def _check_size(unit: str, units: int, batch: int, delta: float) -> None:
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
