"""What was spent: the privacy loss of sampled Gaussian steps, by accountants that never read below the truth.

``pld``, the default, composes privacy loss distributions (Google's dp-accounting; Doroshenko et al. 2022, "connect the
dots"), rounded so that epsilon is an upper bound. ``rdp`` composes Renyi divergences (Mironov et al. 2019) and is
looser. Accountants that may read below the truth (GDP, the Gaussian formula sqrt(2 ln(1.25/delta)) / epsilon) are not
there to be chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import dp_accounting
import numpy as np
from absl import logging as absl_logging
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq
from scipy.special import logsumexp

from ..core.errors import UserError

ACCOUNTANTS = ("pld", "rdp")
NEIGHBOURS = ("add_remove", "replace_one")
#: More noise than this per step leaves nothing to learn from; a plan that needs more is refused.
MAX_NOISE = 100.0
#: Less noise than this promises nothing: one step over everybody then costs an epsilon of more than 50.
MIN_NOISE = 0.1
# Losses lie on a grid of 1e-3; where those of one step are so small that its rounding would show, on a finer one.
_GRIDS = (1e-3, 1e-4, 1e-5)
_ROUGH = 1e-2
_COARSE = (1e-2, 1e-1, 1.0, 10.0)
_POINTS, _STEP_POINTS = 4e6, 4e5
# What the Fourier transforms may be off by in delta, per step composed: about ten times what is seen.
_ROUNDING = 1e-15
_TOLERANCE = 1e-3
_RELATIONS = {
    "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}
_ORDERS = np.array(rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_REFUSED = {
    "gdp": "it is an approximation that reads below the truth (1.62 where it is 1.83)",
    "gaussian": "its formula holds for one step and an epsilon below 1 only, and reads below the truth at 10",
    "prv": "it is the same mathematics as pld",
}


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


def epsilon(events: tuple[Event, ...], delta: float, neighbours: str = "add_remove", accountant: str = "pld") -> float:
    """The epsilon that all ``events`` together spend at ``delta``. Infinity where no epsilon holds.

    Guarantee
    ---------
    Neighbours: ``add_remove``: data sets that differ by one privacy unit more or less; ``replace_one``: by one unit
    that is another. Whichever of two such data sets is there changes the distribution of everything the events released
    by at most (epsilon, delta). Trusted: the site alone. Formulas, both in both directions:

    - ``pld``: composition of the privacy loss distributions of (1 - q) N(0) + q N(1) against N(0) for add_remove, and
      against (1 - q) N(0) + q N(-1) for replace_one, each of std z; discretised pessimistically. The second pair
      dominates every two units of norm at most C, since the divergence grows with each one's norm and as their
      correlation falls (Price's theorem); without sampling (q = 1) it is a Gaussian of sensitivity 2 C. Cut-down
      samples: the upper bound of arXiv:2508.15089, for this data set and for one with a unit more.
    - ``rdp``: Renyi divergences of the same pairs (Mironov et al. 2019, section 3.3; replace_one by quadrature),
      turned into epsilon by Canonne et al. 2020, proposition 12. It knows no cut-down samples.

    Rounding of the arithmetic itself is paid for: 1e-15 of delta a step for ``pld``, 1e-14 of the log-moment for
    ``rdp``; a delta that this would eat up is refused.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    require_known(neighbours, accountant)
    if not events:
        return 0.0
    return (_epsilon_pld if accountant == "pld" else _epsilon_rdp)(merged(events), delta, neighbours)


def rough_epsilon(
    events: tuple[Event, ...], delta: float, neighbours: str = "add_remove", accountant: str = "pld"
) -> float:
    """:func:`epsilon`, or a little more, for searches: up to ten times as fast, an upper bound all the same."""
    if accountant != "pld" or not events:
        return epsilon(events, delta, neighbours, accountant)
    require_known(neighbours, accountant)
    return _epsilon_pld(merged(events), delta, neighbours, roughly=True)


def require_known(neighbours: str, accountant: str) -> None:
    """Raise :class:`UserError` unless there is such a relation and such an accountant."""
    if neighbours not in NEIGHBOURS:
        raise UserError(f"privacy.neighbours is `{neighbours}`; there are {' and '.join(NEIGHBOURS)}")
    if accountant not in ACCOUNTANTS:
        why = f": {_REFUSED[accountant]}" if accountant in _REFUSED else ""
        raise UserError(f"privacy.accountant `{accountant}` cannot be chosen{why}; there are pld and rdp")


@lru_cache(maxsize=4096)
def _epsilon_pld(events: tuple[Event, ...], delta: float, neighbours: str, roughly: bool = False) -> float:
    """``roughly``: on a coarser grid where that changes little, ten times as fast."""
    steps = sum(event.steps for event in events)
    slack = _ROUNDING * (steps + 100)
    if slack > delta / 2:
        raise UserError(
            f"privacy.delta {delta:g} is smaller than the arithmetic of {steps} steps can vouch for; use at least "
            f'{2 * slack:.2g}, or privacy.accountant = "rdp"'
        )
    grid = _grid(events, neighbours, roughly)
    if grid is None:
        return math.inf

    def composed(more: int) -> float:
        total = pld.identity(value_discretization_interval=grid)
        for event in events:
            own = replace(event, units=event.units + more) if event.max_batch else event
            total = total.compose(_losses(own, neighbours, grid))
        return float(total.get_epsilon_for_delta(delta - slack))

    # How likely a sample is cut down hangs on the larger of the two data sets: this one, or one with a unit more.
    cut = any(event.max_batch for event in events)
    return max(composed(more) for more in ((0, 1) if cut and neighbours == "add_remove" else (0,)))


def _grid(events: tuple[Event, ...], neighbours: str, roughly: bool) -> float | None:
    """The coarsest grid whose rounding adds little to the variance of the losses. Every grid gives an upper bound.

    A still coarser one where the losses of one step reach too far for that; None where they reach too far for any.
    """
    reach = 2.0 if neighbours == "replace_one" else 1.0
    total, widest, added = 0.0, 0.0, dict.fromkeys((_ROUGH, *_GRIDS), 0.0)
    for event in events:
        whole = event.sampling_rate == 1 and not event.max_batch  # all its steps are one Gaussian
        noise = event.noise_multiplier / math.sqrt(event.steps) if whole else event.noise_multiplier
        count = 1 if whole else event.steps
        spread = reach * event.sampling_rate * math.sqrt(math.expm1(min(noise**-2, 50.0)))
        total += count * spread**2
        widest = max(widest, reach * (0.5 * reach / noise**2 + 12 / noise))
        for grid in added:
            added[grid] += count * min(grid * spread, grid**2 / 4)
    if widest / _GRIDS[0] > _STEP_POINTS:
        return next((grid for grid in _COARSE if widest / grid <= _STEP_POINTS), None)
    if roughly and added[_ROUGH] <= 5e-4 * total:
        return _ROUGH
    for grid, finer in itertools.pairwise(_GRIDS):
        if added[grid] <= 0.02 * total or 20 * math.sqrt(total) / finer > _POINTS:
            return grid
    return _GRIDS[-1]


@lru_cache(maxsize=32)
def _losses(event: Event, neighbours: str, grid: float) -> pld.PrivacyLossDistribution:
    """The composed privacy loss distribution of one event."""
    if event.sampling_rate == 1 and not event.max_batch:
        # So many Gaussians are one, of so much less noise.
        noise = event.noise_multiplier / math.sqrt(event.steps)
        return _step_losses(Event(noise, 1.0, 1), neighbours, grid)
    return _step_losses(replace(event, steps=1), neighbours, grid).self_compose(event.steps)


@lru_cache(maxsize=64)
def _step_losses(event: Event, neighbours: str, grid: float) -> pld.PrivacyLossDistribution:
    """That of one step, which costs far more than to compose it: a run asks for it after every round."""
    options = {"value_discretization_interval": grid, "neighboring_relation": _RELATIONS[neighbours]}
    if event.max_batch:
        return pld.from_truncated_subsampled_gaussian_mechanism(
            event.units, event.sampling_rate, event.max_batch, event.noise_multiplier, **options
        )
    return pld.from_gaussian_mechanism(event.noise_multiplier, sampling_prob=event.sampling_rate, **options)


@lru_cache(maxsize=4096)
def _epsilon_rdp(events: tuple[Event, ...], delta: float, neighbours: str) -> float:
    total = sum(event.steps * _renyi(replace(event, steps=1), neighbours) for event in events)
    return float(rdp.compute_epsilon(_ORDERS, total, delta)[0])


@lru_cache(maxsize=256)
def _renyi(event: Event, neighbours: str) -> np.ndarray:
    """Renyi divergences of one step at ``_ORDERS``, what rounding may take from them added."""
    if event.max_batch:
        raise UserError(
            'privacy.accountant "rdp" knows no cut-down samples; use "pld" with privacy.sampler = "truncated_poisson"'
        )
    rate, noise = event.sampling_rate, event.noise_multiplier
    if neighbours == "replace_one":
        divergence = _ORDERS * 2 / noise**2 if rate == 1 else _renyi_replaced(rate, noise)
    else:
        before = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)  # it warns of each order that it leaves out
        try:
            accountant = rdp.RdpAccountant(_ORDERS)
            gaussian = dp_accounting.GaussianDpEvent(noise)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian))
            divergence = accountant.rdp
        finally:
            absl_logging.set_verbosity(before)
    return np.maximum(divergence, 0.0) * (1 + 1e-13) + 1e-14 * _ORDERS / (_ORDERS - 1)


def _renyi_replaced(rate: float, noise: float) -> np.ndarray:
    """Renyi divergence of (1 - q) N(0) + q N(1) from (1 - q) N(0) + q N(-1) by the trapezoidal rule.

    The integrand is analytic within pi noise^2 of the real line and falls like a normal, so the rule's error is
    exponentially small in the step. Orders that would take too many points count as infinite, which is an upper bound.
    """
    divergence = np.full(len(_ORDERS), math.inf)
    for at, order in enumerate(_ORDERS):
        step = min(noise, noise**2) / (16 * max(1.0, order / 64))
        low, high = -12 * noise - 1, 2 * order + 12 * noise
        if (high - low) / step > 2e5:
            continue
        x = np.arange(low, high, step)
        up, down = ((sign * 2 * x - 1) / (2 * noise**2) for sign in (1, -1))
        stay, move = math.log1p(-rate), math.log(rate)
        log_ratio = order * np.logaddexp(stay, move + up) + (1 - order) * np.logaddexp(stay, move + down)
        log_density = -0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
        divergence[at] = (logsumexp(log_ratio + log_density) + math.log(step)) / (order - 1)
    return divergence


@lru_cache(maxsize=1024)
def calibrate_noise(
    target: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    spent: tuple[Event, ...] = (),
    neighbours: str = "add_remove",
    accountant: str = "pld",
    units: int = 0,
    max_batch: int = 0,
    most: float = MAX_NOISE,
) -> float:
    """The least noise multiplier for ``steps`` more steps so that they and ``spent`` stay within ``target``.

    To 2e-3, and never below :data:`MIN_NOISE`. ``units`` and ``max_batch`` as in :class:`Event`. Raises
    :class:`UserError` when no noise up to ``most`` does.

    Guarantee
    ---------
    ``epsilon((*spent, Event(result, sampling_rate, steps, ...)), delta, ...) <= target``; see :func:`epsilon`.
    """

    def events(noise: float) -> tuple[Event, ...]:
        return (*spent, Event(noise, sampling_rate, steps, units, max_batch))

    def after(noise: float) -> float:
        return rough_epsilon(events(noise), delta, neighbours, accountant)

    require_known(neighbours, accountant)
    upper = 1.6  # halves down to MIN_NOISE; small noise is slow to account for, so the search comes from above
    while upper > MIN_NOISE and after(upper / 2) <= target:
        upper /= 2
    if upper <= MIN_NOISE:
        return upper
    while after(upper) > target:
        if upper == most:
            raise UserError(
                f"privacy.epsilon {target:g} at delta {delta:g} cannot be reached in {steps} steps at sampling rate "
                f"{sampling_rate:.3g}{' after what was already spent' if spent else ''}: even noise {most:g} gives "
                f"{above(after(upper), target)}; use fewer rounds or steps, a smaller batch, more data, or a larger "
                "epsilon"
            )
        upper = min(2 * upper, most)

    def excess(log_noise: float) -> float:
        # In logarithms both ways it is nearly a straight line. Too little noise may have no finite epsilon.
        return math.log(min(max(after(math.exp(log_noise)), 1e-12), 1e6) / target)

    found = math.exp(brentq(excess, math.log(upper / 2), math.log(upper), xtol=_TOLERANCE / upper))
    while epsilon(events(found), delta, neighbours, accountant) > target:
        found += _TOLERANCE / 2
    return found


def above(value: float, limit: float) -> str:
    """``value`` in as few digits as show that it is above ``limit``."""
    for digits in range(3, 17):
        text = f"{value:.{digits}g}"
        if float(text) > limit and text != f"{limit:.{digits}g}":
            return text
    return repr(value)
