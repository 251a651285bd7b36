"""Layer 3 of the audit: each test has the distribution that it claims, and sees what it is there to see."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from fedgraft.privacy.audit import noise as layer
from fedgraft.privacy.audit.noise import Draws, Run, noise

TENSORS = [("a", 40), ("b", 40), ("c", 300), ("d", 7)]
SIZE, STEPS = 387, 6


def normals(seed: int, steps: int = STEPS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((steps, SIZE)))


def runs(seed: int = 0) -> list[Run]:
    return [Run(name, normals(3 * seed + number)) for number, name in enumerate(("north", "north again", "south"))]


def draws(seed: int = 0, rate: float = 0.2) -> Draws:
    sizes = np.random.default_rng(seed + 10_000).binomial(50, rate, 200)
    return Draws("watched", tuple(sizes.tolist()), 50, 0.2)


def test_honest_noise_passes_a_hundred_times() -> None:
    """At 1e-3 each, the chance of two alarms or more is 0.5 %; seeded, so it is the same every time."""
    assert sum(not noise(runs(seed), TENSORS, [draws(seed)], steps=STEPS).good for seed in range(100)) <= 1


def test_the_p_values_of_every_test_are_uniform_on_honest_noise() -> None:
    """Else `ALPHA` would not be the rate of false alarms: each kind by itself, held to 1e-4 by a test of its own."""
    found: dict[str, list[float]] = {}
    for seed in range(60):
        for look in (*layer._looks(runs(seed), TENSORS), *layer._samples([draws(seed)])):
            found.setdefault(look.kind, []).append(look.p)
    assert set(found) == {"size", "shape", "steps", "runs", "tensors", "sampling"}
    for kind, values in found.items():
        if kind == "sampling":
            # A discrete test is never more eager than it says.
            assert sum(p <= 0.05 for p in values) <= stats.binom.ppf(1 - 1e-4, len(values), 0.05), kind
            continue
        # The tests of one audit share their noise, so that each audit lends one value of each kind.
        share = len(values) // 60
        assert stats.kstest(values[::share], "uniform").pvalue > 1e-4, kind
        assert sum(p <= 0.01 for p in values) <= 2 * 0.01 * len(values) + 10, kind


def test_the_correlation_test_is_the_textbook_one() -> None:
    one, two = normals(1)[:2].numpy()
    r = float(one @ two / math.sqrt(float(one @ one) * float(two @ two)))
    t = r * math.sqrt((SIZE - 1) / (1 - r * r))
    assert layer._correlation(r, SIZE) == pytest.approx(2 * (1 - stats.t.cdf(abs(t), SIZE - 1)), rel=1e-6)
    assert layer._correlation(1.0, SIZE) < 1e-100 and layer._correlation(-1.0, SIZE) < 1e-100


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> list[Run]:
    return [Run(run.name, change(run.z)) for run in runs()]


def _column(part: slice, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, part] *= factor
        return z

    return change


def _clean_step(z: torch.Tensor) -> torch.Tensor:
    z = z.clone()
    z[3] = 0
    return z


def _copied_tensor(z: torch.Tensor) -> torch.Tensor:
    z = z.clone()
    z[:, 40:80] = z[:, :40]
    return z


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: z / 2, "its noise has 0.2"),
        (lambda z: z * 1.2, "its noise has 1.4"),
        (lambda z: z / 16, "its noise has 0.003"),
        (_column(slice(40, 80), 0.0), "tensor b: its noise has 0 times"),
        (_column(slice(380, 387), 0.1), "tensor d: its noise has 0.01"),
        (_clean_step, "north, step 4: its noise has 0 times"),
        (lambda z: z[:1].expand(STEPS, -1), "steps 1 and 2 of north: their noise correlates by 1"),
        (lambda z: -z[:1].expand(STEPS, -1) * torch.tensor([[1.0], [-1.0]] * 3), "their noise correlates by -1"),
        (_copied_tensor, "tensors a and b: their noise correlates by 1"),
        (lambda z: (torch.special.ndtr(z) - 0.5) * 12**0.5, "its noise is not normal"),
        (lambda z: z.sign(), "its noise is not normal"),
    ],
    ids=[
        *("half", "more", "over batch", "clean tensor", "small tensor", "clean step", "repeated", "alternating"),
        *("copied", "uniform", "signs"),
    ],
)
def test_wrong_noise_is_seen(change: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    assert noise(runs(), TENSORS).good, "the same without the change"
    verdict = noise(changed(change), TENSORS)
    assert not verdict.good
    assert any(said in finding for finding in verdict.findings), verdict.findings


def test_one_noise_at_two_sites_is_seen() -> None:
    one, two, three = runs()
    verdict = noise([one, two, Run("south", one.z.flip(0))], TENSORS)
    assert any(finding.startswith("north and south: their noise correlates by 1") for finding in verdict.findings)
    assert noise([one, two, three], TENSORS).good


def test_another_sampling_rate_is_seen() -> None:
    verdict = noise(runs(), TENSORS, [draws(rate=0.25)])
    assert any("units were sampled in 200 steps, where 2,000 are expected" in text for text in verdict.findings)
    assert noise(runs(), TENSORS, [draws()]).good


def test_batches_of_a_fixed_size_are_seen() -> None:
    """Shuffled batches, accounted for as if each unit had thrown its own coin."""
    (finding,) = noise(runs(), TENSORS, [Draws("watched", (10,) * 200, 50, 0.2)]).findings
    assert finding.startswith("watched: 200 of 200 samples are of 8 to 12 units, 62% should be")


@pytest.mark.parametrize(("units", "rate"), [(1, 1.0), (40, 1.0), (30, 1e-6)])
def test_a_sampler_at_the_edge_is_no_finding(units: int, rate: float) -> None:
    sizes = (units if rate == 1 else 0,) * 50
    assert noise(runs(), TENSORS, [Draws("watched", sizes, units, rate)]).good


def test_a_step_that_released_nothing_is_seen() -> None:
    verdict = noise([Run("north", normals(0, 5))], TENSORS, steps=6)
    assert verdict.findings == ("north: 5 noisy steps were released where the plan takes 6",)
    assert not noise([Run("north", torch.zeros(0, SIZE))], TENSORS, steps=6).good


def test_noise_that_is_not_a_number_is_seen() -> None:
    z = normals(0)
    z[0, 0] = math.nan
    assert not noise([Run("north", z)], TENSORS).good


def test_the_drawing_holds_every_value_once() -> None:
    drawing = noise(runs(), TENSORS).drawing
    assert sum(drawing["counts"]) == 3 * STEPS * SIZE
    assert len(drawing["edges"]) == len(drawing["counts"]) + 1
    assert np.allclose(drawing["quantiles"], drawing["normal"], atol=0.15)
