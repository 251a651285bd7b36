"""A number for each thing that chance decides in a simulation: of the seed and of what it is about, of no order."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

_BITS = 53
_NORMAL = NormalDist()


def uniform(seed: int, *about: object) -> float:
    """Uniform in (0, 1), the same whenever and wherever it is asked for."""
    text = "|".join(map(str, (seed, *about)))
    bits = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - _BITS)
    return (bits + 0.5) / 2**_BITS


def normal(seed: int, *about: object) -> float:
    """Standard normal, likewise."""
    return _NORMAL.inv_cdf(uniform(seed, *about))
