"""Layer 4: a lower bound on epsilon from one run, by guessing which canaries took part.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", arXiv 2305.08846, theorem 5.2: of m
canaries each is put in by a fair coin; if r guesses about the coins come out right v times, then under
(epsilon, delta)-DP the chance of that is at most :func:`p_value`. Guessing is post-processing, so any score will do.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from .verdict import Verdict

#: The bound that is told holds with this much doubt, as in the paper; the verdict asks for less.
DOUBT = 0.05
_LITTLE_DOUBT = 0.01
#: Guesses are made for this share of the canaries at each end of the scores; the others are passed over.
GUESSED = 0.1
_LARGEST = 50.0


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest chance that (epsilon, delta)-DP leaves for ``right`` of ``guesses`` or more, theorem 5.2."""
    chance = 1 / (1 + np.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, chance))
    # P[right - i <= Bin < right], for i = 1 .. right, over i.
    below = np.cumsum(stats.binom.pmf(right - np.arange(1, right + 1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2 * canaries * delta * steepest)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, doubt: float = DOUBT) -> float:
    """The largest epsilon that the guesses rule out with doubt ``doubt``; 0 where they rule out nothing."""
    low, high = 0.0, _LARGEST
    if not guesses or p_value(canaries, guesses, right, low, delta) >= doubt:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < doubt:
            low = middle
        else:
            high = middle
    return low


def scores(canaries: torch.Tensor, released: torch.Tensor, noise_std: float) -> torch.Tensor:
    """How much of each canary there is in what was released, shape (m,).

    ``canaries`` (m, P): their clipped gradients; ``released`` (K, P): the noisy sums of the steps. The inner product of
    each canary's gradient with the mean release, freed of what the other canaries add to it, since real records of one
    class look alike: the posterior mean of the coins, were they normal of mean and std 1/2 (ridge regression).
    """
    g, mean = canaries.double(), released.double().mean(0)
    gram = g @ g.T
    ridge = max(4 * noise_std**2 / max(1, len(released)), 1e-12 * float(gram.diagonal().mean()), 1e-300)
    return 0.5 + torch.linalg.solve(gram + ridge * torch.eye(len(g), dtype=g.dtype), g @ (mean - g.sum(0) / 2))


def lower_bound(values: torch.Tensor, coins: np.ndarray, claim: float, delta: float, *, rate: float = 1.0) -> Verdict:
    """Guess the top scores in and the bottom scores out, and hold what that shows against the claimed epsilon.

    ``claim``: the epsilon at ``delta`` of the steps that were released to the guesser.
    """
    m = len(coins)
    each = max(1, round(m * GUESSED))
    order = np.argsort(values.numpy(), kind="stable")
    right = int(coins[order[-each:]].sum() + (~coins[order[:each]]).sum())
    guesses = 2 * each
    bound, certain = (epsilon_bound(m, guesses, right, delta, doubt) for doubt in (DOUBT, _LITTLE_DOUBT))
    ceiling = epsilon_bound(m, guesses, guesses, delta)
    findings = []
    if not bool(torch.isfinite(values).all()):
        findings.append("what was released holds NaN or infinity")
    elif certain > claim:
        findings.append(f"the guesses show an epsilon above {certain:.2f}; the claim for these steps is {claim:.2f}")
    said = (
        f"{right} of {guesses} guesses were right, which shows an epsilon of at least {bound:.2f}; "
        f"these steps claim {claim:.2f}."
    )
    return Verdict(
        "lower bound",
        said,
        tuple(findings),
        {
            "canaries": m,
            "guesses": guesses,
            "right": right,
            "bound": bound,
            "doubt": DOUBT,
            "bound_for_verdict": certain,
            "doubt_for_verdict": _LITTLE_DOUBT,
            "ceiling": ceiling,
            "claim": claim,
            "delta": delta,
            "sampling_rate": rate,
        },
        {
            "in": [float(f"{score:.4g}") for score in values[torch.from_numpy(coins)].tolist()],
            "out": [float(f"{score:.4g}") for score in values[torch.from_numpy(~coins)].tolist()],
        },
    )
