"""Evaluation counts under differential privacy: noised sums over the held-out units, which the ledger pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.config import RunConfig
from .accounting import Event, calibrate_noise, epsilon
from .noise import RandomStream

#: A loss counts at most so many times that of guessing evenly: one record gone wrong must not drown the noise's share.
LOSS_BOUND = 2.0
# A unit gives its share of right answers and of the bound on the loss, both in [0, 1] and counted from 1/2.
_SENSITIVITY = math.sqrt(0.5)


@dataclass(frozen=True)
class Scores:
    """Of each held-out record, how many examples it holds, how many were right, and their summed loss, each (n,)."""

    examples: np.ndarray
    correct: np.ndarray
    loss_sum: np.ndarray

    def exact(self) -> dict[str, float]:
        """The plain totals. Not private."""
        return {key: float(getattr(self, key).sum()) for key in ("examples", "correct", "loss_sum")}


def evaluations_left(config: RunConfig, round: int) -> int:
    """How many evaluations a run still has from that of ``round`` on, this one included."""
    every = config.evaluate.every
    due = {0, config.rounds, *(range(every, config.rounds + 1, every) if every else ())}
    return max(1, sum(number >= round for number in due))


def release_event(config: RunConfig, round: int, spent: tuple[Event, ...]) -> Event:
    """What one release of this run's evaluation costs: the least noise that keeps its whole budget.

    ``spent``: all that held-out units have paid so far. Raises :class:`UserError` when no noise keeps the budget.

    Guarantee
    ---------
    Neighbours: held-out sets that differ by one unit. All evaluations of the run, with ``spent``, are within
    ``evaluate.epsilon`` (``privacy.epsilon`` where it is 0) at ``privacy.delta``. A unit is held out or trained on,
    never both under one split, so what it pays here is not what others pay for the training.
    """
    privacy, left = config.privacy, evaluations_left(config, round)
    budget = config.evaluate.epsilon or privacy.epsilon
    if spent and spent[-1] == replace(spent[-1], sampling_rate=1.0, steps=1):
        again = replace(spent[-1], steps=left)
        if epsilon((*spent, again), privacy.delta, privacy.neighbours, privacy.accountant) <= budget:
            return spent[-1]
    noise = calibrate_noise(
        budget, privacy.delta, 1.0, left, spent, neighbours=privacy.neighbours, accountant=privacy.accountant
    )
    return Event(noise, 1.0, 1)


def noised(
    scores: Scores, groups: Sequence[np.ndarray], even_loss: float, noise_multiplier: float, stream: RandomStream
) -> dict[str, float]:
    """``examples``, ``correct`` and ``loss_sum`` over the held-out units, noised; a unit counts as one example.

    ``groups``: record indices of each unit; ``even_loss``: the loss of an even guess (:meth:`Task.even_loss`).

    Guarantee
    ---------
    Neighbours: add/remove (or replace) of one unit; their number is public. Each unit gives the vector (share of its
    examples that are right - 1/2, mean loss capped at L and divided by L - 1/2), of L2 norm at most sqrt(1/2); the sum
    gets Gaussian noise of std ``noise_multiplier`` * sqrt(1/2) on both coordinates. What follows (adding n/2,
    scaling by L, cutting to what is possible) is post-processing.
    """
    bound, units = LOSS_BOUND * even_loss, len(groups)
    rows = np.zeros((units, 2))
    for at, group in enumerate(groups):
        examples = scores.examples[group].sum()
        rows[at] = scores.correct[group].sum() / examples, scores.loss_sum[group].sum() / examples / bound
    # A loss that is no number is the worst one.
    rows = np.clip(np.nan_to_num(rows, nan=1.0), 0.0, 1.0) - 0.5
    total = rows.sum(axis=0) + noise_multiplier * _SENSITIVITY * stream.normal(2)
    correct, loss = np.clip(total + units / 2, 0.0, units)
    return {"examples": float(units), "correct": float(correct), "loss_sum": float(loss * bound)}
