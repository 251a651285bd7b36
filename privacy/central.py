"""Client-level privacy that the server adds: the mathematics of DP-FedAvg with a fixed or an adaptive clip.

Sources: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963 (algorithm
1, the fixed-denominator estimator); Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
arXiv 1905.03871 (algorithm 1, theorem 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..core.config import RunConfig
from ..core.errors import NonFiniteError, UserError
from .accounting import MIN_NOISE, Event, calibrate_noise, epsilon

#: As in the paper of Andrew et al.: the noise on the count of sites within the clip, as a share of the sites.
_COUNT_NOISE = 1 / 20
_ROUNDING = 1e-9


class Randomness(Protocol):
    """What noise and sampling are drawn from; :class:`~fedgraft.privacy.noise.RandomStream` is one."""

    def normal(self, count: int) -> np.ndarray: ...

    def uniform(self, count: int) -> np.ndarray: ...


def noise_beside_count(noise_multiplier: float, count_noise: float) -> float:
    """z_delta: the noise multiplier of the sum where a count with noise std ``count_noise`` is released beside it.

    Raises :class:`UserError` where the count alone tells more than ``noise_multiplier`` allows for both.

    Guarantee
    ---------
    The count adds b - 1/2 for each site, so its sensitivity is 1/2 and its noise multiplier 2 sigma_b. Both releases
    together are one Gaussian mechanism of multiplier z when z^-2 = z_delta^-2 + (2 sigma_b)^-2; hence z_delta =
    (z^-2 - (2 sigma_b)^-2)^(-1/2) (Andrew et al. 2021, theorem 1). Neighbours: add/remove of a site.
    """
    left = noise_multiplier**-2 - (2 * count_noise) ** -2
    if not left > 0:
        raise UserError(
            f"a count with noise {count_noise:g} tells more than noise multiplier {noise_multiplier:g} allows; "
            f"give the count noise above {noise_multiplier / 2:g}, or switch central.clip_quantile off"
        )
    return float(left**-0.5)


def next_clip(clip: float, within: float, quantile: float, rate: float) -> float:
    """C exp(-eta (b - gamma)), with ``within`` the noised share of sites whose change was at most C long.

    Andrew et al. 2021, algorithm 1. Raises :class:`UserError` when that leaves the floating-point numbers.
    """
    exponent = -rate * (within - quantile)
    moved = clip * math.exp(exponent) if exponent < 700 else math.inf
    if not (moved > 0 and math.isfinite(moved)):
        raise UserError(f"the adaptive clip went from {clip:g} to {moved:g}; lower central.clip_rate")
    return moved


@dataclass(frozen=True)
class CentralPlan:
    """What the server promises each site for the rounds to come, and what it has already spent.

    ``sites``: all sites of the run, answering or not; ``rounds``: rounds still to run, 0 at the end; ``spent``: every
    round so far. With ``clip_quantile`` above 0 the clip adapts, and ``clip`` is the first one.

    Guarantee
    ---------
    Neighbours: two federations over the same list of sites, in one of which the changes of one site are left out of
    every sum. Trusted: the server, which sees each change as it comes, and knows who was asked and who answered.
    Whoever sees only the global adapters is told nothing more of any site than (``epsilon``, ``delta``) allows, if
    each round's adapter is a function of the last one and of :meth:`ClippedSum.release` over a Poisson sample of the
    sites at ``sampling_rate``. A plan that would break this does not construct: it raises :class:`UserError`.
    """

    sites: int
    sampling_rate: float
    rounds: int
    clip: float
    noise_multiplier: float
    epsilon: float
    delta: float
    clip_quantile: float = 0.0
    clip_rate: float = 0.2
    spent: tuple[Event, ...] = ()
    seeded_noise_not_private: bool = False

    neighbours = "add_remove"

    def __post_init__(self) -> None:
        _check(self.sites, self.sampling_rate, self.rounds, self.delta)
        for key, value in (("clip", self.clip), ("epsilon", self.epsilon)):
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"central.{key} is {value:g}; it must be a positive, finite number")
        if not (self.noise_multiplier >= MIN_NOISE and math.isfinite(self.noise_multiplier)):
            raise UserError(
                f"central.noise_multiplier is {self.noise_multiplier:g}; below {MIN_NOISE:g} there is no guarantee "
                "worth the name (central.enabled = false says so openly)"
            )
        if not 0 <= self.clip_quantile < 1:
            raise UserError(f"central.clip_quantile is {self.clip_quantile:g}; it is at least 0 and below 1")
        if self.adaptive and not (self.clip_rate > 0 and math.isfinite(self.clip_rate)):
            raise UserError(f"central.clip_rate is {self.clip_rate:g}; it must be a positive, finite number")
        total = self.final_epsilon
        if total > self.epsilon * (1 + _ROUNDING):
            raise UserError(
                f"central noise multiplier {self.noise_multiplier:g} spends epsilon {total:.3g} over the run, more "
                f"than central.epsilon {self.epsilon:g}; raise central.noise_multiplier, leave it out to have it "
                "chosen, or run fewer rounds"
            )

    @property
    def adaptive(self) -> bool:
        return self.clip_quantile > 0

    @property
    def expected_sites(self) -> float:
        """Sites asked in a round on average: the fixed denominator."""
        return self.sampling_rate * self.sites

    @property
    def event(self) -> Event:
        """What one round spends."""
        return Event(self.noise_multiplier, self.sampling_rate, 1)

    @property
    def final_epsilon(self) -> float:
        """Epsilon once all planned rounds are over."""
        return epsilon(_all(self.spent, self.noise_multiplier, self.sampling_rate, self.rounds), self.delta)

    @property
    def count_noise(self) -> float:
        """sigma_b: the paper's n / 20 or, where sites are few, z, so that the sum never pays more than 16 % for it."""
        return max(_COUNT_NOISE * self.expected_sites, self.noise_multiplier)

    @property
    def sum_noise(self) -> float:
        """Noise std on each coordinate of the sum, over the clip."""
        if not self.adaptive:
            return self.noise_multiplier
        return noise_beside_count(self.noise_multiplier, self.count_noise)

    @property
    def noise_on_mean(self) -> float:
        """Noise std on each coordinate of the mean, over the clip."""
        return self.sum_noise / self.expected_sites

    def noise_norm(self, parameters: int) -> float:
        """Length of the noise on a mean of ``parameters`` numbers, over the clip, which is the longest mean."""
        return math.sqrt(parameters) * self.noise_on_mean

    @classmethod
    def for_run(cls, config: RunConfig, rounds: int, spent: tuple[Event, ...] = ()) -> CentralPlan:
        """The plan for the ``rounds`` that remain of a run.

        The noise is the configured one or, where none is configured, the last one used as long as it keeps the
        promise, else the least that does: after a lost round, which stays spent, the rest of the run takes more.
        """
        central, sites = config.central, len(config.data.sites)
        rate = central.sampling_rate
        _check(sites, rate, rounds, central.delta)
        noise = central.noise_multiplier
        if not noise and spent and spent[-1].sampling_rate == rate:
            noise = spent[-1].noise_multiplier
            # With no round to come there is nothing left to choose.
            if rounds and epsilon(_all(spent, noise, rate, rounds), central.delta) > central.epsilon:
                noise = 0.0
        return cls(
            sites=sites,
            sampling_rate=rate,
            rounds=rounds,
            clip=central.clip,
            noise_multiplier=noise or _calibrated(central.epsilon, central.delta, rate, rounds, spent),
            epsilon=central.epsilon,
            delta=central.delta,
            clip_quantile=central.clip_quantile,
            clip_rate=central.clip_rate,
            spent=spent,
            seeded_noise_not_private=central.seeded_noise_not_private,
        )

    def warning(self, parameters: int) -> str:
        """What a person must know before they wait for this run; empty where noise does not drown the sites.

        ``parameters``: how many numbers the sites share.
        """
        against = self.noise_norm(parameters)
        if against <= 1:
            return ""
        needed = math.ceil(math.sqrt(parameters) * self.sum_noise / self.sampling_rate)
        times = f"{against:.1f}" if against < 10 else f"{against:,.0f}"
        return (
            f"central privacy over {self.sites} sites: every round adds noise of {self.noise_on_mean:.2g} x clip to "
            f"each of the {parameters:,} shared numbers, {times} times as long in all as the largest change that the "
            f"sites together can make; only with about {needed:,} sites would the two be level. Where patients are to "
            'be protected, let the sites do it (privacy.enabled, privacy.unit = "patient"): for 5,000 patients, 256 a '
            "step, 1,000 steps and epsilon 3 that noise is 0.009 x clip"
        )


class ClippedSum:
    """One round's sum over sites: each change scaled to at most ``plan.clip`` (or ``clip``), all with equal weights.

    Changes are flat float64 arrays of length ``parameters``, over all shared tensors together.

    Guarantee
    ---------
    Adding or removing one site's change moves the sum by at most C in L2 norm, and the centred count by 1/2: the scale
    is min(1, C / norm), norms and sums in float64, and neither the sites' records nor the number that answered enters.
    :meth:`release` is therefore one Gaussian mechanism of multiplier ``plan.noise_multiplier``. Trusted: the server.
    """

    def __init__(self, plan: CentralPlan, parameters: int, clip: float | None = None) -> None:
        self.plan = plan
        self.clip = plan.clip if clip is None else clip
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise UserError(f"the clip is {self.clip:g}; it must be a positive, finite number")
        self._sum = np.zeros(parameters, dtype=np.float64)
        self._count = 0.0
        self._released = False

    def add(self, change: np.ndarray) -> None:
        """Take in one site's change. Raises :class:`UserError`, and takes in nothing, when it is not finite."""
        if change.shape != self._sum.shape or change.dtype != np.float64:
            raise ValueError(f"a change is {self._sum.shape} of float64, not {change.shape} of {change.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.linalg.norm(change))
        if not math.isfinite(norm):
            raise NonFiniteError("the change holds NaN or infinity, or is too long to measure")
        self._sum += change * (min(1.0, self.clip / norm) if norm > 0 else 1.0)
        self._count += 0.5 if norm <= self.clip else -0.5

    def release(self, noise: Randomness) -> tuple[np.ndarray, float]:
        """The noised mean change, and the noised share of sites within the clip (0 where the clip is fixed). Once."""
        if self._released:
            raise ValueError("a sum is released once: a second draw of noise is a second release")
        self._released = True
        plan = self.plan
        mean = (self._sum + plan.sum_noise * self.clip * noise.normal(len(self._sum))) / plan.expected_sites
        if not plan.adaptive:
            return mean, 0.0
        count = self._count + plan.count_noise * float(noise.normal(1)[0])
        return mean, count / plan.expected_sites + 0.5

    def next_clip(self, within: float) -> float:
        """The clip of the round after, from the noised share that :meth:`release` gave."""
        return next_clip(self.clip, within, self.plan.clip_quantile, self.plan.clip_rate)


def _all(spent: tuple[Event, ...], noise: float, rate: float, rounds: int) -> tuple[Event, ...]:
    """What was spent, and ``rounds`` more."""
    return (*spent, Event(noise, rate, rounds)) if rounds else spent


def _calibrated(target: float, delta: float, rate: float, rounds: int, spent: tuple[Event, ...]) -> float:
    try:
        return calibrate_noise(target, delta, rate, rounds, spent)
    except UserError:
        spent_before = f" after the {sum(event.steps for event in spent)} already spent" if spent else ""
        raise UserError(
            f"central.epsilon {target:g} at central.delta {delta:g} cannot be reached in {rounds} rounds at sampling "
            f"rate {rate:g}{spent_before}, whatever the noise; use fewer rounds, a lower central.sampling_rate, or a "
            "larger central.epsilon"
        ) from None


def _check(sites: int, rate: float, rounds: int, delta: float) -> None:
    if sites < 1:
        raise UserError("central privacy needs at least one site")
    if not 0 < rate <= 1:
        raise UserError(f"central.sampling_rate is {rate:g}; it must be above 0 and at most 1")
    if rounds < 0:
        raise UserError(f"a central privacy plan of {rounds} rounds: there are none to come, or some")
    if not delta > 0:
        raise UserError(f"central.delta is {delta:g}; it must be above 0")
    if delta >= 1 / sites:
        raise UserError(
            f"central.delta {delta:g} is not below 1/{sites}, the chance of naming one of the {sites} sites outright; "
            "make it smaller"
        )
