"""An accountant from the definition, to check the others by: privacy losses, discretised and convolved by FFT.

It shares no code with them and knows no cut-down samples. It gives an estimate and, below it, a bound that holds for
certain; an accountant that reads less than the bound is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from .accounting import Event, merged

_CELLS = 100_000
_POINTS = 1 << 19
_LEAST_NOISE = 0.05
# Mass that may wrap around the transform, and the chance that rounding goes further than its bound.
_LEAST = 1e-14


@dataclass(frozen=True)
class Checked:
    """``estimate``: epsilon but for discretisation, in either direction; ``least``: epsilon is not below this."""

    estimate: float
    least: float


def check_epsilon(events: tuple[Event, ...], delta: float, neighbours: str = "add_remove") -> Checked:
    """Epsilon of ``events`` at ``delta``, from the definition. Raises ValueError for what it does not know.

    A step is the pair (P, Q) of one-dimensional mixtures that :func:`fedgraft.privacy.accounting.epsilon` names. The
    line is cut into cells, which as post-processing can only lower epsilon; a cell's loss log P/Q, weighted by P, is
    shared out between the two nearest points of a grid so that its mean stays; the composition is the product of the
    Fourier transforms; delta(epsilon) = E[(1 - exp(epsilon - loss))+]. Rounding moves a loss of one step by at most the
    grid's step h, in either direction and by nothing on average, so that over T steps it moves the sum by more
    than h sqrt(T ln(1/eta) / 2) with a chance of eta at most (Hoeffding 1963): that much lower lies ``least``.
    """
    events = merged(events)
    if any(event.max_batch for event in events):
        raise ValueError("the check knows no cut-down samples")
    if any(event.noise_multiplier < _LEAST_NOISE for event in events):
        raise ValueError(f"the check knows no noise below {_LEAST_NOISE}, where cells have no mass left to compare")
    pairs = [(-1, False)] if neighbours == "replace_one" else [(0, False), (0, True)]
    both = [_one_direction(events, delta, shift, swapped) for shift, swapped in pairs]
    return Checked(max(one.estimate for one in both), max(one.least for one in both))


def _one_direction(events: tuple[Event, ...], delta: float, shift: int, swapped: bool) -> Checked:
    steps = [_step(event, shift, swapped) for event in events]
    low, high = _range(events, steps)
    grid = (high - low) / (_POINTS - 4)
    spectrum, start = np.ones(_POINTS // 2 + 1, dtype=complex), 0.0
    for event, (loss, mass) in zip(events, steps, strict=True):
        place = (loss - loss.min()) / grid
        left = np.floor(place).astype(np.int64)
        share = place - left
        points = np.bincount(left % _POINTS, weights=mass * (1 - share), minlength=_POINTS)
        points += np.bincount((left + 1) % _POINTS, weights=mass * share, minlength=_POINTS)
        spectrum *= np.fft.rfft(points) ** event.steps
        start += event.steps * float(loss.min())
    # Point i of the circle stands for every start + (i + k * _POINTS) * grid; exactly one of these is in the range.
    first = math.floor((low - start) / grid)
    total = np.roll(np.fft.irfft(spectrum, _POINTS), -(first % _POINTS))
    losses = start + (first + np.arange(_POINTS)) * grid
    moved = grid * math.sqrt(sum(event.steps for event in events) * math.log(1 / (_LEAST * 1e-2)) / 2)
    # What the transforms may be off by, and the two tails.
    slack = 3 * _LEAST + 1e-15 * sum(event.steps for event in events)
    return Checked(
        estimate=_solve(losses, total, delta),
        least=max(0.0, float(_solve(losses, total, delta + slack) - moved)),
    )


def _step(event: Event, shift: int, swapped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Loss and mass of each cell of one step. ``shift``: where the other unit's normal stands, 0 for none."""
    rate, noise = event.sampling_rate, event.noise_multiplier
    edges = np.linspace(min(0, shift) - 12 * noise, 1 + 12 * noise, _CELLS + 1)

    def normal(mean: float) -> np.ndarray:
        z = (edges - mean) / noise
        # Differences of the tail that is near, or nothing would be left of them.
        return np.where(z[1:] + z[:-1] > 0, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))

    base = normal(0)
    p = (1 - rate) * base + rate * normal(1)
    q = (1 - rate) * base + rate * normal(shift) if shift else base
    if swapped:
        p, q = q, p
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.log(p) - np.log(q)
    # A cell without mass gives nothing; one that only P reaches is left out, which can only lower epsilon.
    kept = np.isfinite(loss) & (p > 0)
    return loss[kept], p[kept]


def _range(events: tuple[Event, ...], steps: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Where all but ``_LEAST`` of the composed losses lie on either side, by Chernoff's bound."""
    ends = {}
    for sign in (-1, 1):
        best = math.inf
        for order in np.geomspace(1e-2, 1e5, 40):
            moments = 0.0
            for event, (loss, mass) in zip(events, steps, strict=True):
                exponent = sign * order * loss
                top = float(exponent.max())
                moments += event.steps * (top + math.log(float(mass @ np.exp(exponent - top))))
            best = min(best, (moments - math.log(_LEAST)) / order)
        ends[sign] = sign * best
    return ends[-1], ends[1]


def _solve(losses: np.ndarray, mass: np.ndarray, delta: float) -> float:
    """The epsilon at which ``delta`` is left, by bisection."""

    def left(epsilon: float) -> float:
        above = losses > epsilon
        return float(mass[above] @ -np.expm1(epsilon - losses[above]))

    low, high = 0.0, max(0.0, float(losses[-1]))
    if left(low) <= delta:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > delta else (low, middle)
    return high
