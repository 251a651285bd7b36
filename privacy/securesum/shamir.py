"""A secret in shares, of which ``threshold`` give it back and fewer say nothing (Shamir 1979).

A share is the value at its index of a random polynomial of degree threshold - 1 over the integers modulo a prime,
whose value at 0 is the secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from ...core.errors import UserError

#: The smallest prime above 2^256: every secret of 32 bytes is an element.
PRIME = 2**256 + 297
SECRET, SHARE = 32, 33


def split(secret: bytes, threshold: int, indices: range) -> dict[int, bytes]:
    """Shares of ``secret`` (32 bytes) by index, each of 33 bytes; ``indices`` begin at 1."""
    if len(secret) != SECRET or not 1 <= threshold <= len(indices) or indices.start < 1:
        raise ValueError("32 bytes are shared among at least as many indices, from 1 on, as give them back")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for index in indices:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * index + coefficient) % PRIME
        shares[index] = value.to_bytes(SHARE, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly as many ``shares`` as it takes, by Lagrange's formula at 0.

    Raises :class:`UserError` where the result is no secret, which false shares give.
    """
    total = 0
    for index, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != index:
                above = above * other % PRIME
                below = below * (other - index) % PRIME
        total += int.from_bytes(share, "big") * above * pow(below, -1, PRIME)
    try:
        return (total % PRIME).to_bytes(SECRET, "big")
    except OverflowError:
        raise UserError("the shares of a site's secret do not fit together: a site sent a false one") from None
