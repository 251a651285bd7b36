"""The protocol from end to end: the sum is that of naive integers, whoever is lost, and below the threshold nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.privacy.securesum import SecureServer, Sum, Terms
from fedgraft.privacy.securesum.server import ShortError
from fedgraft.privacy.securesum.terms import least_threshold, usual_threshold

STEPS = ("keys", "shares", "numbers", "agreement", "reveal")


def require_exact(circle, found: Sum) -> None:
    """``found`` is the decoded sum of Python's integers, bit for bit, and within the stated error of the real mean."""
    totals = circle.integers(found.sites)
    ring = circle.terms.ring
    as_ring = np.array([total % 2**circle.bits for total in totals], dtype=ring.dtype)
    mean, weight = ring.decode(as_ring)
    assert found.weight == weight == totals[-1]
    assert np.array_equal(found.mean, mean)
    assert np.abs(found.mean - circle.mean(found.sites)).max() <= found.error


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sites", [3, 5, 10])
def test_the_sum_is_that_of_naive_integers(circle, sites, bits):
    one = circle(sites, bits=bits)
    found = one.sum()
    assert found.sites == one.names
    require_exact(one, found)


def test_two_of_five_may_be_lost(circle):
    one = circle(5, threshold=3, lost={"s01": "numbers", "s03": "numbers"})
    found = one.sum()
    assert found.sites == ("s00", "s02", "s04")
    require_exact(one, found)


@settings(max_examples=60)
@given(
    sites=st.integers(3, 8),
    bits=st.sampled_from((32, 64)),
    threshold=st.integers(0, 8),
    lost=st.lists(st.sampled_from(("", *STEPS)), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_whoever_is_lost_at_whatever_step_the_sum_is_exact_or_there_is_none(circle, sites, bits, threshold, lost, seed):
    least = least_threshold(sites)
    threshold = min(max(threshold, least), sites)
    names = [f"s{number:02d}" for number in range(sites)]
    gone = {name: step for name, step in zip(names, lost, strict=False) if step}
    one = circle(sites, bits=bits, threshold=threshold, lost=gone, length=7, seed=seed)
    if sites - len(gone) >= threshold:
        found = one.sum()
        # Who was lost after the numbers had been sent is in the sum.
        assert set(found.sites) == {n for n in names if gone.get(n) not in ("keys", "shares", "numbers")}
        require_exact(one, found)
    else:
        with pytest.raises(ShortError, match=rf"which needs {threshold} .*: nothing was unmasked"):
            one.sum()


@pytest.mark.parametrize("step", STEPS)
def test_fewer_than_the_threshold_end_in_one_line_that_says_so(circle, step):
    one = circle(5, threshold=4, lost={"s00": step, "s04": step})
    with pytest.raises(ShortError, match=r"3 of 5 sites .* needs 4"):
        one.sum()


def test_a_site_that_is_lost_after_its_numbers_came_still_counts(circle):
    one = circle(5, threshold=3, lost={"s00": "agreement", "s04": "reveal"})
    found = one.sum()
    assert found.sites == one.names
    require_exact(one, found)


def test_weights_count(circle):
    one = circle(
        3,
        length=1,
        most_weight=1000,
        numbers={"s00": np.array([1.0]), "s01": np.array([2.0]), "s02": np.array([-1.0])},
        weights={"s00": 1, "s01": 1000, "s02": 10},
    )
    found = one.sum()
    assert found.weight == 1011
    assert found.mean[0] == pytest.approx((1 + 2000 - 10) / 1011, abs=1e-9)


def test_the_order_in_which_sites_answer_does_not_matter(circle):
    one, two = circle(4, seed=5), circle(4, seed=5)
    two.left = lambda step, of: list(reversed(type(two).left(two, step, of)))
    assert np.array_equal(one.sum().mean, two.sum().mean)


@pytest.mark.parametrize(
    ("sites", "threshold", "why"),
    [
        (2, 2, "two reveal each other"),
        (3, 2, "lies within 3 and 3"),
        (5, 2, "lies within 3 and 5"),
        (10, 5, "lies within 6 and 10"),
        (5, 6, "lies within 3 and 5"),
        (1001, 700, "1000 sites at most"),
    ],
)
def test_terms_that_protect_nobody_are_refused(sites, threshold, why):
    with pytest.raises(UserError, match=why):
        Terms("r", 1, tuple(f"s{n:04d}" for n in range(sites)), threshold, 64, 1.0, 1)


def test_the_usual_threshold_is_more_than_two_thirds_and_never_below_three():
    assert [usual_threshold(n) for n in (3, 4, 5, 6, 7, 9, 10, 30)] == [3, 3, 4, 5, 5, 7, 7, 21]
    for sites in range(3, 200):
        assert least_threshold(sites) <= usual_threshold(sites) <= sites
        assert 2 * least_threshold(sites) > sites


def test_terms_that_differ_in_anything_have_another_context():
    plain = {"run": "r", "round": 1, "sites": ("a", "b", "c", "d"), "threshold": 3, "bits": 64}
    plain |= {"limit": 1.0, "most_weight": 5}
    others = {"run": "q", "round": 2, "sites": ("a", "b", "c", "e"), "threshold": 4, "bits": 32}
    others |= {"limit": 1.0000000001, "most_weight": 6}
    contexts = {Terms(**plain).context} | {Terms(**{**plain, key: value}).context for key, value in others.items()}
    assert len(contexts) == 1 + len(others)


# What the server refuses of a site


def test_a_site_cannot_send_in_anothers_name_nor_twice_nor_unasked(circle):
    one = circle(3)
    server = SecureServer(one.terms, one.length)
    advert = one.ask("s00", lambda site: site.advertise())
    with pytest.raises(UserError, match=r"^s01: sent the keys of s00"):
        server.advert("s01", advert)
    server.advert("s00", advert)
    with pytest.raises(UserError, match=r"^s00: took this step .* before"):
        server.advert("s00", advert)
    with pytest.raises(UserError, match=r"^s01: was not asked"):
        server.masked("s01", np.zeros(101, np.uint64))


@pytest.mark.parametrize(
    "entries", [np.zeros(100, np.uint64), np.zeros(101, np.uint32), np.zeros(101), np.zeros((1, 101), np.uint64)]
)
def test_numbers_of_another_length_or_kind_do_not_count(circle, entries):
    one = circle(3)
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    one.server._masked.discard("s01")
    with pytest.raises(UserError, match=r"^s01: sent .* expected are 101 of uint64"):
        one.server.masked("s01", entries)


def test_one_false_share_among_enough_right_ones_does_no_harm_and_too_many_are_found(circle):
    def spoil(reveals, count):
        for name in sorted(reveals)[:count]:
            reveals[name].seeds["s02"] = bytes(33)

    one = circle(5, threshold=3)
    one.sum()
    spoil(one.server._reveals, 2)
    require_exact(one, one.server.result())
    spoil(one.server._reveals, 3)
    with pytest.raises(UserError, match="the secret of s02 do not give it back"):
        one.server.result()


def test_numbers_that_were_masked_otherwise_are_found_by_the_weights(circle):
    one = circle(3)
    one.sum()
    one.server._total[-1] += np.uint64(1 << 40)
    with pytest.raises(UserError, match="weights cannot be"):
        one.server.result()
