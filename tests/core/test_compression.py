"""Fewer bytes: int8 is unbiased and within a step, the largest numbers are the largest, coding loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedgraft.core.compression import coded, decoded, largest, quantise, restored
from fedgraft.core.errors import UserError

numbers = arrays(np.float32, array_shapes(max_dims=2, max_side=20), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(change=numbers, seed=st.integers(0, 1000))
def test_int8_is_within_one_step_of_every_number(change: np.ndarray, seed: int) -> None:
    levels, step = quantise(change, np.random.default_rng(seed))
    assert levels.dtype == np.int8 and levels.shape == change.shape
    # A hair more than a step: the division by the step is rounded.
    assert np.all(np.abs(restored(levels, step) - change) <= step * (1 + 1e-9) + np.finfo(np.float32).tiny)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    change = np.array([1.0, 0.3141, -0.77, 1e-3, 0.0])
    random = np.random.default_rng(0)
    draws = np.stack([restored(*quantise(change, random)) for _ in range(40_000)])
    step = 1.0 / 127
    # A rounding has a standard deviation of at most half a step; 5 of those of the mean.
    assert np.all(np.abs(draws.mean(0) - change) <= 5 * 0.5 * step / np.sqrt(len(draws)))
    assert np.all(draws[:, 4] == 0)


def test_rounding_to_the_nearest_would_be_biased_where_this_is_not() -> None:
    change = np.array([127.0, 0.3])
    mean = np.mean([restored(*quantise(change, np.random.default_rng(seed)))[1] for seed in range(5000)])
    assert round(0.3) == 0 and mean == pytest.approx(0.3, abs=0.04)


def test_a_change_of_nothing_has_no_step() -> None:
    levels, step = quantise(np.zeros((3, 2)), np.random.default_rng(0))
    assert step == 0 and not restored(levels, step).any()


@given(change=arrays(np.float64, st.integers(1, 60), elements=st.floats(-5, 5)), fraction=st.floats(0.01, 1))
def test_the_largest_are_at_least_as_large_as_all_others(change: np.ndarray, fraction: float) -> None:
    at, values = largest(change, fraction)
    assert len(at) == max(1, round(fraction * change.size)) and np.all(np.diff(at.astype(int)) > 0)
    np.testing.assert_array_equal(values, change[at])
    rest = np.delete(np.abs(change), at)
    assert not rest.size or rest.max() <= np.abs(values).min()


def test_of_equal_numbers_the_first_are_kept() -> None:
    assert largest(np.array([1.0, -2.0, 2.0, 2.0]), 0.5)[0].tolist() == [1, 2]


@given(array=numbers)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "int16", "uint32"])
def test_coding_loses_nothing(array: np.ndarray, dtype: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        given = array.astype(dtype)
    got = decoded(coded(given), given.dtype, given.size)
    assert got.dtype == given.dtype and got.tobytes() == given.reshape(-1).tobytes()


def test_numbers_of_one_magnitude_become_smaller() -> None:
    array = (1e-3 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    assert len(coded(array)) < 0.95 * array.nbytes


@pytest.mark.parametrize("size", [0, 9, 11, 10**9])
def test_coded_bytes_that_hold_other_numbers_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"does not hold the {size} numbers"):
        decoded(coded(np.ones(10, np.float32)), np.dtype("float32"), size)


def test_bytes_after_the_end_and_bytes_that_are_none_are_refused() -> None:
    whole = coded(np.ones(10, np.float32))
    with pytest.raises(UserError, match="does not hold the 10 numbers"):
        decoded(whole + b"x", np.dtype("float32"), 10)
    with pytest.raises(UserError, match="does not hold the 10 numbers"):
        decoded(whole[:-3], np.dtype("float32"), 10)
    with pytest.raises(UserError, match="cannot be read"):
        decoded(b"not zlib", np.dtype("float32"), 10)


def test_a_bomb_is_not_inflated() -> None:
    bomb = coded(np.zeros(50_000_000, np.int8))
    assert len(bomb) < 100_000
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(UserError, match="does not hold the 10 numbers"):
        decoded(bomb, np.dtype("int8"), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
