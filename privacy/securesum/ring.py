"""Fixed point: real numbers, each times its site's weight, as integers modulo a power of two that add up exactly.

A site's vector x with weight w becomes round(clip(x, -R, R) * (w / W) / s), to the nearest integer, halves to the even
one, and w itself as one more entry. R is the limit, W the largest weight, s = R / Q the step, and Q is so small that
the sum over all sites cannot leave [-2^(bits-1), 2^(bits-1)): it never wraps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core.errors import UserError

#: More levels would be lost in the 53 bits of a float64 anyway.
_MOST_LEVELS = 1 << 44
#: The share of a step that one site's rounding is off by at most: a half, and what float64 loses on the way to it,
#: which is 3 roundings of 2^-53 on at most 2^44 steps.
_HALF = 0.5 + 3 * 2.0 ** (44 - 53)


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^``bits`` that hold the weighted sum of ``sites`` vectors between -``limit`` and ``limit``.

    ``most_weight``: the largest weight of a site. Raises :class:`UserError` where the ring has no room for the sum.
    """

    bits: Literal[32, 64]
    limit: float
    most_weight: int
    sites: int

    def __post_init__(self) -> None:
        if self.sites * self.most_weight >= 1 << self.bits or self.levels < 1:
            raise UserError(
                f"a secure sum of {self.bits} bits has no room for {self.sites} weights of up to {self.most_weight}; "
                "set secure_sum.bits = 64, or lower secure_sum.most_records"
            )

    @property
    def levels(self) -> int:
        """Q: the integers of one site lie within -Q and Q."""
        return min(_MOST_LEVELS, ((1 << (self.bits - 1)) - 1) // self.sites)

    @property
    def step(self) -> float:
        """s: what one unit of the ring is worth, in numbers of a site with the largest weight."""
        return self.limit / self.levels

    @property
    def dtype(self) -> np.dtype:
        """Little-endian on every machine."""
        return np.dtype(f"<u{self.bits // 8}")

    def require_weight(self, weight: int) -> None:
        """Raise :class:`UserError` for a weight that is not within 1 and ``most_weight``."""
        if not 1 <= weight <= self.most_weight:
            raise UserError(
                f"the weight of this site is {weight}, the secure sum takes 1 to {self.most_weight}; raise "
                "secure_sum.most_records"
            )

    def encode(self, numbers: np.ndarray, weight: int) -> np.ndarray:
        """``numbers`` (n,) under ``weight`` as n + 1 entries of the ring, of which the last is the weight.

        Raises :class:`UserError` for a number that is not finite, and for a weight that is not allowed.
        """
        self.require_weight(weight)
        if not np.isfinite(numbers).all():
            raise UserError("a number for the secure sum is not finite; nothing is sent")
        scaled = np.clip(numbers.astype(np.float64), -self.limit, self.limit)
        scaled *= weight / self.most_weight * self.levels / self.limit
        entries = np.empty(numbers.size + 1, self.dtype)
        entries[:-1] = np.rint(scaled, out=scaled).astype(np.int64).astype(self.dtype)
        entries[-1] = weight
        return entries

    def clipped(self, numbers: np.ndarray) -> int:
        """How many of ``numbers`` lie beyond the limit."""
        return int(np.count_nonzero(np.abs(numbers) > self.limit))

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, int]:
        """The weighted mean sum w x / sum w, in float64, and sum w, of a sum of encoded vectors."""
        weight = int(total[-1])
        if weight < 1:
            raise UserError("the weights of the secure sum add up to nothing")
        signed = total[:-1].astype(self.dtype).view(f"<i{self.bits // 8}")
        return signed.astype(np.float64) * (self.step * (self.most_weight / weight)), weight

    def error(self, sites: int, weight: int) -> float:
        """The most that any entry of the mean of ``sites`` vectors, whose weights sum to ``weight``, is off by, beside
        the rounding of the float64 that holds it. Numbers beyond the limit count as clipped to it."""
        return sites * _HALF * self.step * self.most_weight / weight
