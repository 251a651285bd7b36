"""Shares: the threshold gives the secret back, fewer do not, and the arithmetic is that of a polynomial."""

from __future__ import annotations

import itertools
import secrets
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.privacy.securesum import shamir


def naive(shares: dict[int, bytes]) -> int:
    """Lagrange at 0 over the rationals, then modulo the prime."""
    total = 0
    for index, share in shares.items():
        factor = Fraction(1)
        for other in shares:
            if other != index:
                factor *= Fraction(other, other - index)
        total += int.from_bytes(share, "big") * factor.numerator * pow(factor.denominator, -1, shamir.PRIME)
    return total % shamir.PRIME


@given(sites=st.integers(1, 12), threshold=st.integers(1, 12), data=st.data())
def test_any_so_many_shares_give_the_secret_back(sites, threshold, data):
    threshold = min(threshold, sites)
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = shamir.split(secret, threshold, range(1, sites + 1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    picked = {index: shares[index] for index in chosen}
    assert shamir.combine(picked) == secret == naive(picked).to_bytes(32, "big")


def test_one_share_fewer_fits_every_secret():
    secret = secrets.token_bytes(32)
    shares = shamir.split(secret, 3, range(1, 6))
    for other in (bytes(32), b"\xff" * 32):
        # With two shares fixed there is a third that makes any secret of them.
        for pair in itertools.combinations(shares, 2):
            known = {index: int.from_bytes(shares[index], "big") for index in pair}
            (a, fa), (b, fb) = known.items()
            c, zero = 9, int.from_bytes(other, "big")
            points = {0: zero, a: fa, b: fb}
            value = 0
            for x, y in points.items():
                above = below = 1
                for z in points:
                    if z != x:
                        above, below = above * (c - z), below * (x - z)
                value += y * above * pow(below, -1, shamir.PRIME)
            third = {a: shares[a], b: shares[b], c: (value % shamir.PRIME).to_bytes(33, "big")}
            assert shamir.combine(third) == other


def test_the_modulus_is_prime():
    # Miller and Rabin with 64 random bases: a composite passes with probability below 2^-128.
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(64):
        value = pow(secrets.randbelow(shamir.PRIME - 3) + 2, odd, shamir.PRIME)
        trail = [value] + [value := value * value % shamir.PRIME for _ in range(twos - 1)]
        assert trail[0] == 1 or shamir.PRIME - 1 in trail
    assert shamir.PRIME > 2**256


def test_false_shares_do_not_give_the_secret():
    secret = secrets.token_bytes(32)
    shares = shamir.split(secret, 2, range(1, 4))
    false = {1: shares[1], 2: (int.from_bytes(shares[2], "big") ^ 1).to_bytes(33, "big")}
    try:
        assert shamir.combine(false) != secret
    except UserError as error:
        assert "false" in str(error)


@pytest.mark.parametrize(
    ("secret", "threshold", "indices"),
    [(b"short", 2, range(1, 4)), (bytes(32), 4, range(1, 4)), (bytes(32), 0, range(1, 4)), (bytes(32), 2, range(3))],
)
def test_what_cannot_be_shared_is_refused(secret, threshold, indices):
    with pytest.raises(ValueError, match="are shared among"):
        shamir.split(secret, threshold, indices)
