"""The bound that adapts itself, held against the paper's own update and against what must not leave."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedgraft.privacy.adaptive import adapted
from fedgraft.privacy.noise import RandomStream


def _stream(*parts: object) -> RandomStream:
    return RandomStream.seeded_not_private("adaptive", *parts)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_bound_goes_to_the_quantile_of_the_norms(quantile: float) -> None:
    draw, stream, clip = np.random.default_rng(1), _stream(quantile), 0.01
    late = []
    for step in range(800):
        norms = np.exp(draw.normal(0.0, 0.5, draw.binomial(1000, 0.2)))
        within = int((norms <= clip).sum())
        clip = adapted(
            clip,
            within,
            len(norms) - within,
            quantile=quantile,
            rate=0.2,
            count_noise=10.0,
            expected=200,
            stream=stream,
        )
        if step >= 400:
            late.append(clip)
    norms = np.exp(draw.normal(0.0, 0.5, 100_000))
    # Shares of a step vary by their own binomial noise and by the noise of the count, both of about 5 %.
    assert abs(float((norms <= np.median(late)).mean()) - quantile) < 0.03


def test_without_noise_it_is_the_update_of_the_paper() -> None:
    """Algorithm 1 with b the mean of the indicators, over exactly the expected number of units."""
    for within, over in ((0, 20), (13, 7), (20, 0)):
        got = adapted(2.0, within, over, quantile=0.3, rate=0.5, count_noise=0.0, expected=20, stream=_stream("none"))
        assert got == pytest.approx(2.0 * math.exp(-0.5 * (within / 20 - 0.3)), rel=1e-12)


def test_an_empty_step_moves_it_by_noise_around_one_half_alone() -> None:
    moved = [
        math.log(
            adapted(1.0, 0, 0, quantile=0.5, rate=1.0, count_noise=2.0, expected=40, stream=_stream("empty", number))
        )
        for number in range(2000)
    ]
    # The noised count alone: std 2/40, mean 0.
    assert abs(np.mean(moved)) < 5 * 0.05 / math.sqrt(2000)
    assert np.std(moved) == pytest.approx(0.05, rel=0.1)


def test_one_unit_more_changes_the_count_by_one_half() -> None:
    """What the noise must hide: the noised share before noise, over neighbouring steps."""

    def share(within: int, over: int) -> float:
        bound = adapted(1.0, within, over, quantile=0.0, rate=1.0, count_noise=0.0, expected=10, stream=_stream())
        return -10 * math.log(bound)

    assert abs(share(5, 4) - share(4, 4)) == pytest.approx(0.5)
    assert abs(share(4, 5) - share(4, 4)) == pytest.approx(0.5)


def test_no_noise_can_throw_it_away() -> None:
    bounds = [
        adapted(1.0, 3, 1, quantile=0.5, rate=0.2, count_noise=1e9, expected=4, stream=_stream("huge", number))
        for number in range(50)
    ]
    assert set(np.round(bounds, 12)) == {round(math.exp(0.1), 12), round(math.exp(-0.1), 12)}
