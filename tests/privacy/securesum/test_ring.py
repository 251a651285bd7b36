"""Fixed point: what a number becomes in the ring, what of it comes back, and that the sum never wraps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.privacy.securesum import Ring


def summed(ring: Ring, vectors: list[np.ndarray], weights: list[int]) -> np.ndarray:
    total = np.zeros(vectors[0].size + 1, ring.dtype)
    for vector, weight in zip(vectors, weights, strict=True):
        total += ring.encode(vector, weight)
    return total


@given(
    bits=st.sampled_from((32, 64)),
    sites=st.integers(1, 40),
    limit=st.floats(1e-3, 1e3),
    most=st.integers(1, 1 << 20),
    seed=st.integers(0, 2**32),
)
def test_the_mean_is_within_the_stated_error_of_the_clipped_mean(bits, sites, limit, most, seed):
    ring, rng = Ring(bits, limit, most, sites), np.random.default_rng(seed)
    vectors = [rng.uniform(-1.5, 1.5, 20) * limit for _ in range(sites)]
    weights = [int(rng.integers(1, most + 1)) for _ in range(sites)]
    mean, weight = ring.decode(summed(ring, vectors, weights))
    assert weight == sum(weights)
    exact = sum(w * np.clip(v, -limit, limit) for v, w in zip(vectors, weights, strict=True)) / weight
    assert np.abs(mean - exact).max() <= ring.error(sites, weight) + 1e-12 * limit


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_extremes_of_all_sites_together_do_not_wrap(bits, sign):
    ring = Ring(bits, 2.0, 7, 1000)
    mean, weight = ring.decode(summed(ring, [np.full(3, sign * 2.0)] * 1000, [7] * 1000))
    assert weight == 7000
    assert np.abs(mean - sign * 2.0).max() <= ring.error(1000, 7000)


def test_one_site_more_than_the_ring_was_made_for_would_wrap():
    ring = Ring(32, 1.0, 1, 3)
    full = summed(ring, [np.ones(1)] * 4, [1] * 4)
    assert ring.decode(full)[0][0] < 0


def test_rounding_is_to_the_nearest_and_halves_go_to_the_even_integer():
    ring = Ring(32, 1.0, 1, 3)
    steps = np.array([0.49, 0.5, 0.51, 1.5, 2.5, -0.5, -1.5])
    assert ring.encode(steps * ring.step, 1)[:-1].view("<i4").tolist() == [0, 0, 1, 2, 2, 0, -2]


def test_the_stated_error_is_reached_so_nothing_smaller_could_be_stated():
    ring = Ring(32, 1.0, 1, 3)
    mean, weight = ring.decode(summed(ring, [np.full(1, 0.4999 * ring.step)] * 3, [1] * 3))
    assert abs(mean[0] - 0.4999 * ring.step) > 0.98 * ring.error(3, weight)


def test_numbers_beyond_the_limit_count_as_the_limit_and_are_counted():
    ring = Ring(64, 1.0, 1, 3)
    numbers = np.array([5.0, -5.0, 0.5])
    assert ring.clipped(numbers) == 2
    assert ring.decode(ring.encode(numbers, 1))[0] == pytest.approx([1.0, -1.0, 0.5], abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused(bad):
    with pytest.raises(UserError, match="not finite"):
        Ring(64, 1.0, 1, 3).encode(np.array([0.0, bad]), 1)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_beyond_what_was_agreed_is_refused_with_the_key_to_raise(weight):
    with pytest.raises(UserError, match=r"secure_sum.most_records"):
        Ring(64, 1.0, 10, 3).encode(np.zeros(1), weight)


def test_a_ring_without_room_for_the_weights_is_refused():
    Ring(32, 1.0, (1 << 32) // 3, 3)
    with pytest.raises(UserError, match=r"secure_sum.bits = 64"):
        Ring(32, 1.0, (1 << 32) // 3 + 1, 3)


def test_entries_are_little_endian_unsigned_integers():
    assert Ring(32, 1.0, 1, 3).encode(np.zeros(2), 1).dtype == np.dtype("<u4")
    assert Ring(64, 1.0, 1, 3).encode(np.zeros(2), 1).tobytes() == bytes(16) + b"\1" + bytes(7)
