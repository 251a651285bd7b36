"""A clipping bound that follows a quantile of the gradients' norms, itself differentially private."""

from __future__ import annotations

import math

from .noise import RandomStream


def adapted(
    clip: float,
    within: int,
    over: int,
    *,
    quantile: float,
    rate: float,
    count_noise: float,
    expected: float,
    stream: RandomStream,
) -> float:
    """The next bound: C exp(-rate (b - quantile)), with b the noised share of units whose norm was at most C.

    ``within`` and ``over``: the units of the step whose norm was, and was not; ``count_noise``: std of the noise on
    their count; ``expected``: the expected number of units a step. Source: Andrew et al. 2021, "Differentially
    Private Learning with Adaptive Clipping", arXiv 1905.03871, algorithm 1.

    Guarantee
    ---------
    Neighbours: add/remove of a unit. Each unit gives +1/2 or -1/2, so the sum has sensitivity 1/2 and, with the
    gradient's noise sigma_g, the pair is one Gaussian mechanism of noise (sigma_g^-2 + (2 count_noise)^-2)^(-1/2): that
    one is what the ledger holds. Whatever follows from the noised share is post-processing.
    """
    noisy = (within - over) / 2 + count_noise * float(stream.normal(1)[0])
    share = noisy / expected + 0.5
    # One step moves the bound by no more than all units within it, or none, would: noise alone must not throw it away.
    share = min(max(share, 0.0), 1.0)
    return clip * math.exp(-rate * (share - quantile))
