"""The random stream is uniform and normal, independent between keys, and reproducible only when seeded.

Streams are seeded, so a test passes or fails for good; each p-value bound would be crossed by chance once in 10^4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedgraft.privacy.noise import RandomStream

_CHANCE = 1e-4
_MANY = 200_000


def _stream(*parts: object) -> RandomStream:
    return RandomStream.seeded_not_private("test", *parts)


def test_the_words_are_aes_256_in_counter_mode() -> None:
    key = bytes(range(32))
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    naive = b"".join(blocks.update(counter.to_bytes(16, "big")) for counter in range(3))
    stream = RandomStream(key)
    got = np.concatenate([stream.words(1), stream.words(0), stream.words(5)])
    assert got.tobytes() == naive


def test_normals_are_standard_normal() -> None:
    draws = _stream("normal").normal(_MANY)
    assert stats.kstest(draws, "norm").pvalue > _CHANCE
    root = np.sqrt(_MANY)
    # Standard errors of the first four moments of N(0, 1) from n draws: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n.
    for power, want, error in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(np.mean(draws**power) - want) < 4 * error / root
    # Box and Muller make two from one pair of uniforms: halves and neighbours must not tell of each other.
    for a, b in ((draws[: _MANY // 2], draws[_MANY // 2 :]), (draws[:-1], draws[1:])):
        assert stats.pearsonr(a, b).pvalue > _CHANCE
        assert stats.pearsonr(a**2, b**2).pvalue > _CHANCE


def test_the_tails_are_not_cut() -> None:
    draws = np.abs(_stream("tails").normal(1_000_000))
    for bound in (3.0, 4.0):
        beyond = int(np.sum(draws > bound))
        assert stats.binomtest(beyond, len(draws), 2 * stats.norm.sf(bound)).pvalue > _CHANCE


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_an_odd_count_of_normals_has_that_many(count: int) -> None:
    assert _stream("odd").normal(count).shape == (count,)


def test_uniforms_are_uniform_and_never_zero_or_one() -> None:
    draws = _stream("uniform").uniform(_MANY)
    assert draws.min() > 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > _CHANCE


def test_the_extreme_words_stay_inside_the_open_interval() -> None:
    class Extreme(RandomStream):
        def words(self, count: int) -> np.ndarray:
            return np.array([0, 2**64 - 1], dtype="<u8")[:count]

    low, high = Extreme(bytes(32)).uniform(2)
    assert 0 < low < high < 1
    assert np.isfinite(Extreme(bytes(32)).normal(4)).all()


def test_below_is_uniform_on_each_range() -> None:
    bounds = np.repeat([1, 2, 7], _MANY // 10)
    draws = _stream("below").below(bounds)
    assert draws.dtype == np.int64
    for bound in (1, 2, 7):
        counts = np.bincount(draws[bounds == bound], minlength=bound)
        assert len(counts) == bound
        if bound > 1:
            assert stats.chisquare(counts).pvalue > _CHANCE


def test_a_permutation_holds_everything_once_and_every_order_is_as_likely() -> None:
    stream = _stream("permutation")
    assert sorted(stream.permutation(1000)) == list(range(1000))
    orders: dict[tuple[int, ...], int] = {}
    for _ in range(12_000):
        order = tuple(stream.permutation(4).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > _CHANCE


def test_the_same_seed_gives_the_same_stream_and_any_other_part_another() -> None:
    first = _stream(1, "site-a", 3).words(64)
    assert (first == _stream(1, "site-a", 3).words(64)).all()
    others = [_stream(2, "site-a", 3), _stream(1, "site-b", 3), _stream(1, "site-a", 4), _stream(1, "site-a3")]
    for other in others:
        assert not (first == other.words(64)).any()


def test_parts_do_not_run_into_each_other() -> None:
    a, b, c = (RandomStream.seeded_not_private(*parts).words(1)[0] for parts in ((1, 23), (12, 3), ("1|23",)))
    assert len({a, b, c}) == 3


def test_streams_are_independent() -> None:
    """Two sites with the same seed must not draw the same noise: it would cancel by subtraction."""
    a, b = _stream(0, "a", 1).normal(_MANY), _stream(0, "b", 1).normal(_MANY)
    assert stats.pearsonr(a, b).pvalue > _CHANCE
    assert np.std(a - b) == pytest.approx(np.sqrt(2), rel=0.01)


def test_a_stream_does_not_repeat_itself() -> None:
    stream = _stream("repeat")
    assert not (stream.words(64) == stream.words(64)).any()


def test_the_operating_system_gives_another_key_each_time_whatever_the_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = RandomStream.from_os().words(64)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not (first == RandomStream.from_os().words(64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_like_takes_shape_and_dtype(dtype: torch.dtype) -> None:
    like = _stream("like").normal_like(torch.empty(3, 5, dtype=dtype))
    assert like.shape == (3, 5) and like.dtype == dtype
    assert np.allclose(like.flatten().numpy(), _stream("like").normal(15), rtol=1e-6)
