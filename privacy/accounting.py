"""What was spent: the privacy loss of Poisson-subsampled Gaussian steps, by privacy loss distributions.

Google's dp-accounting composes the steps numerically (Doroshenko et al. 2022, "connect the dots"), pessimistically:
the epsilon reported is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting import pld
from dp_accounting.mechanism_calibration import ExplicitBracketInterval

from ..core.errors import UserError

#: More noise than this per step leaves nothing to learn from; a plan that needs more is refused.
MAX_NOISE = 100.0
#: Less noise than this promises nothing: one step over everybody then costs an epsilon of more than 50.
MIN_NOISE = 0.1
_GRID = 1e-3
_TOLERANCE = 1e-3


@dataclass(frozen=True, order=True)
class Event:
    """``steps`` releases of a Gaussian sum with noise std ``noise_multiplier`` times the clip, each over a Poisson
    sample of the privacy units at ``sampling_rate``; where ``max_batch`` is given, of ``units`` units, and cut down to
    ``max_batch`` of them at random."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    units: int = 0
    max_batch: int = 0

    def __post_init__(self) -> None:
        for value in (self.noise_multiplier, self.sampling_rate):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"noise multiplier and sampling rate are numbers, not {value!r}")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError("the noise multiplier must be positive and finite")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError("the sampling rate must be in (0, 1]")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError("an event has a whole number of steps, at least one")
        for count in (self.units, self.max_batch):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError("units and max_batch are whole numbers, 0 for none")
        if bool(self.units) != bool(self.max_batch):
            raise ValueError("units and max_batch go together")

    def to_dict(self) -> dict[str, float | int]:
        """What a ledger line says of it; the inverse of :meth:`from_dict`."""
        values = asdict(self)
        return (
            values if self.max_batch else {key: values[key] for key in ("noise_multiplier", "sampling_rate", "steps")}
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """Read the event out of a ledger line, other entries ignored. Raises KeyError, ValueError or TypeError."""
        more = {key: values[key] for key in ("units", "max_batch") if key in values}
        return cls(values["noise_multiplier"], values["sampling_rate"], values["steps"], **more)


def merged(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Equal mechanisms added up, sorted: composition does not depend on the order."""
    total: dict[Event, int] = {}
    for event in events:
        key = replace(event, steps=1)
        total[key] = total.get(key, 0) + event.steps
    return tuple(sorted(replace(event, steps=steps) for event, steps in total.items()))


def _accountant() -> pld.PLDAccountant:
    return pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_GRID)


def _dp_event(event: Event) -> dp_accounting.DpEvent:
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    if event.sampling_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, step)
    return dp_accounting.SelfComposedDpEvent(step, event.steps)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    accountant = _accountant()
    for event in events:
        accountant.compose(_dp_event(event))
    return float(accountant.get_epsilon(delta))


def epsilon(events: tuple[Event, ...], delta: float) -> float:
    """The epsilon that all ``events`` together spend at ``delta``.

    Guarantee
    ---------
    Adding or removing one privacy unit changes the distribution of everything the events released by at most
    (epsilon, delta). Trusted: the site alone. Formula: composition of the privacy loss distributions of Poisson-
    subsampled Gaussians, both directions of add/remove, discretised pessimistically at 1e-3.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    return _epsilon(merged(events), delta) if events else 0.0


@lru_cache(maxsize=1024)
def calibrate_noise(
    target: float, delta: float, sampling_rate: float, steps: int, spent: tuple[Event, ...] = ()
) -> float:
    """The least noise multiplier for ``steps`` more steps so that they and ``spent`` stay within ``target``.

    To 2e-3, and never below :data:`MIN_NOISE`. Raises :class:`UserError` when no noise up to :data:`MAX_NOISE` does.

    Guarantee
    ---------
    ``epsilon(spent + (Event(result, sampling_rate, steps),), delta) <= target``; see :func:`epsilon`.
    """

    def after(noise: float) -> float:
        return epsilon((*spent, Event(noise, sampling_rate, steps)), delta)

    upper = 1.6  # halves down to MIN_NOISE; small noise is slow to account for, so the search comes from above
    while upper > MIN_NOISE and after(upper / 2) <= target:
        upper /= 2
    if upper <= MIN_NOISE:
        return upper
    while after(upper) > target:
        if upper == MAX_NOISE:
            raise UserError(
                f"privacy.epsilon {target:g} at delta {delta:g} cannot be reached in {steps} steps at sampling rate "
                f"{sampling_rate:.3g}{' after what was already spent' if spent else ''}: even noise {MAX_NOISE:g} "
                f"gives {after(upper):.3g}; use fewer rounds or steps, a smaller batch, more data, or a larger epsilon"
            )
        upper = min(2 * upper, MAX_NOISE)
    found = dp_accounting.calibrate_dp_mechanism(
        _accountant,
        lambda noise: dp_accounting.ComposedDpEvent(
            [_dp_event(event) for event in merged((*spent, Event(noise, sampling_rate, steps)))]
        ),
        target,
        delta,
        ExplicitBracketInterval(upper / 2, upper),
        tol=_TOLERANCE,
    )
    # The search composes anew and may differ from `epsilon` in the last digits: the promise is the latter's.
    while after(found) > target:
        found += _TOLERANCE
    return float(found)
