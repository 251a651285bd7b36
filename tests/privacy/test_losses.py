"""The independent computation of epsilon against integrals of the definition and the closed form of the Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedgraft.privacy import losses
from fedgraft.privacy.accounting import Event
from fedgraft.privacy.losses import check_epsilon


def _densities(rate: float, noise: float, x: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    base = norm.pdf(x, 0, noise)
    other = (1 - rate) * base + rate * norm.pdf(x, shift, noise) if shift else base
    return (1 - rate) * base + rate * norm.pdf(x, 1, noise), other


def _two_steps(rate: float, noise: float, delta: float, shift: int, swapped: bool) -> float:
    """Epsilon of two steps by integrating (P P - e^eps Q Q)+ over the plane."""
    x = np.linspace(-1 - 9 * noise, 1 + 9 * noise, 1501)
    p, q = _densities(rate, noise, x, shift)
    if swapped:
        p, q = q, p
    first, second = np.outer(p, p), np.outer(q, q)
    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        left = float(np.maximum(first - math.exp(middle) * second, 0).sum()) * (x[1] - x[0]) ** 2
        low, high = (middle, high) if left > delta else (low, middle)
    return high


@pytest.mark.parametrize(("shift", "swapped"), [(0, False), (0, True), (-1, False)])
@pytest.mark.parametrize(("rate", "noise"), [(0.2, 0.8), (0.5, 1.5)])
def test_two_steps_are_the_integral_over_the_plane(rate: float, noise: float, shift: int, swapped: bool) -> None:
    event = Event(noise, rate, 2)
    found = losses._one_direction((event,), 1e-3, shift, swapped)
    twin = _two_steps(rate, noise, 1e-3, shift, swapped)
    # The plane's mesh is good to about 1e-4.
    assert found.estimate == pytest.approx(twin, rel=1e-3)
    assert twin * (1 - 1e-3) < found.least <= found.estimate
    checked = check_epsilon((event,), 1e-3, "replace_one" if shift else "add_remove")
    assert checked.estimate >= found.estimate and checked.least >= found.least


@pytest.mark.parametrize(("neighbours", "reach"), [("add_remove", 1), ("replace_one", 2)])
def test_without_sampling_it_is_the_exact_gaussian(neighbours: str, reach: int) -> None:
    mu, delta = reach * math.sqrt(30) / 6, 1e-6
    checked = check_epsilon((Event(6.0, 1.0, 30),), delta, neighbours)
    left = norm.cdf(mu / 2 - checked.estimate / mu) - math.exp(checked.estimate) * norm.cdf(
        -mu / 2 - checked.estimate / mu
    )
    assert left == pytest.approx(delta, rel=1e-3)
    assert 0.999 * checked.estimate < checked.least <= checked.estimate


def test_unequal_steps_compose_as_equal_ones_do() -> None:
    whole = check_epsilon((Event(1.0, 0.1, 20),), 1e-5)
    parts = check_epsilon((Event(1.0, 0.1, 15), Event(1.0 + 1e-9, 0.1, 5)), 1e-5)
    assert parts.estimate == pytest.approx(whole.estimate, rel=1e-5)


def test_a_delta_that_covers_everything_costs_nothing() -> None:
    assert check_epsilon((Event(1.0, 1e-7, 100),), 1e-2).estimate == 0.0


@pytest.mark.parametrize("event", [Event(1.0, 0.1, 5, 100, 20), Event(0.01, 0.1, 5)])
def test_what_it_does_not_know_it_refuses(event: Event) -> None:
    with pytest.raises(ValueError, match="the check knows no"):
        check_epsilon((event,), 1e-5)
