"""The likelihood ratio attack on membership, and its ROC.

Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570: of each candidate, the
confidence of shadow models that trained on it and of those that did not are two normals; the score of a target is
the log of their likelihood ratio at its confidence. With few shadows the means are each candidate's own and the
variances are shared (their section VI-B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: A loss below this says no more: the confidence is 1 but for rounding.
_LEAST_LOSS = 1e-9


def confidence(losses: np.ndarray, *, classes: bool) -> np.ndarray:
    """The logit of the probability that a model gives the right answer; of a text the mean log-probability."""
    if not classes:
        return -losses
    losses = np.maximum(losses, _LEAST_LOSS)
    return -losses - np.log(-np.expm1(-losses))


def likelihood_ratios(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The score of each candidate, NaN where no shadow trained on it or none trained without it.

    ``target`` (U,): the target's confidence in each candidate; ``shadows`` (N, U): the shadows'; ``inside`` (N, U):
    whether the shadow trained on the candidate.
    """
    found = []
    for chosen in (inside, ~inside):
        count = chosen.sum(0)
        mean = np.where(chosen, shadows, 0.0).sum(0) / np.where(count, count, math.nan)
        rest = np.where(chosen & (count > 0), shadows - mean, 0.0)
        freedom = np.maximum(count - 1, 0).sum()
        variance = max(float((rest**2).sum() / freedom), 1e-12) if freedom else 1.0
        found.append(-((target - mean) ** 2) / (2 * variance) - math.log(variance) / 2)
    return found[0] - found[1]


@dataclass(frozen=True)
class Roc:
    """How well scores tell members from others, over every threshold: ``fpr`` and ``tpr`` from (0, 0) to (1, 1).

    ``auc``: the chance that a member outscores another (ties half); ``error``: its standard error.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float
    error: float
    members: int
    others: int

    def tpr_at(self, fpr: float) -> float | None:
        """The largest TPR at an FPR of ``fpr`` at most; None where so few others cannot show it."""
        if self.others * fpr < 1:
            return None
        return float(self.tpr[self.fpr <= fpr + 1e-12].max())


def roc(scores: np.ndarray, member: np.ndarray, groups: np.ndarray | None = None) -> Roc:
    """The ROC of ``scores``; those that are NaN are left out.

    ``groups``: which target each score is of. Scores of one target share its noise, so with several targets the
    standard error is over their AUCs; with one it is DeLong's (DeLong, DeLong and Clarke-Pearson 1988).
    """
    known = ~np.isnan(scores)
    scores, member = scores[known], member[known]
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits, misses = np.cumsum(member[order])[ends], np.cumsum(~member[order])[ends]
    members, others = int(member.sum()), int((~member).sum())
    auc, error = _auc(scores[member], scores[~member])
    if groups is not None:
        mine = groups[known]
        each = [_auc(scores[(mine == g) & member], scores[(mine == g) & ~member])[0] for g in np.unique(mine)]
        if len(each) > 1:
            auc, error = float(np.mean(each)), float(np.std(each, ddof=1) / math.sqrt(len(each)))
    return Roc(
        np.concatenate([[0.0], misses / max(others, 1)]),
        np.concatenate([[0.0], hits / max(members, 1)]),
        auc,
        error,
        members,
        others,
    )


def _auc(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """AUC and DeLong's standard error, from each score's place among those of the other side."""
    if not len(inside) or not len(outside):
        return math.nan, math.nan
    a, b = np.sort(inside), np.sort(outside)
    above = (np.searchsorted(b, inside, "left") + np.searchsorted(b, inside, "right")) / (2 * len(b))
    below = 1 - (np.searchsorted(a, outside, "left") + np.searchsorted(a, outside, "right")) / (2 * len(a))
    spread = sum(np.var(places, ddof=1) / len(places) for places in (above, below) if len(places) > 1)
    return float(above.mean()), math.sqrt(float(spread))


def dp_tpr(fpr: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """The most TPR that (epsilon, delta)-DP leaves to any attack at each FPR.

    Kairouz, Oh and Viswanath 2015, arXiv 1311.0776, theorem 2.1: TPR <= e^eps FPR + delta, and the same with both
    sides exchanged.
    """
    grown = math.exp(min(epsilon, 700.0))
    return np.minimum(1.0, np.minimum(grown * fpr + delta, 1 - (1 - delta - fpr) / grown))
