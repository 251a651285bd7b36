"""How much noise arrives in the aggregated dW, against the closed forms of `benchmarks/aggregation_noise.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """The module `benchmarks/aggregation_noise.py`."""
    path = Path(__file__).parents[2] / "benchmarks" / "aggregation_noise.py"
    spec = importlib.util.spec_from_file_location("aggregation_noise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["aggregation_noise"] = module
    spec.loader.exec_module(module)
    return module


WEIGHTS, SIGMA, DRAWS = (3.0, 1.0, 2.0, 2.0, 4.0), 0.3, 250


@pytest.mark.parametrize("strategy", ["fedit", "fedex", "flora", "flexlora", "ffa", "fed-sb"])
def test_the_variance_of_dw_is_that_of_the_closed_form(table: ModuleType, strategy: str) -> None:
    """Sites of unlike factors and unlike weights. Five standard errors: a false alarm in a million seeds."""
    (case,) = (case for case in table.CASES if case.strategy == strategy)
    federation = table.Federation(case, WEIGHTS, unlike=True)
    got, error = federation.measured(SIGMA, DRAWS)
    want = federation.expected(SIGMA)
    # Small enough to see the scale, the weights or a power of K that is forgotten.
    assert error < 0.03 * want
    assert abs(got - want) < 5 * error


def test_what_averages_products_takes_in_more_noise_than_what_averages_factors(table: ModuleType) -> None:
    """By the quadratic term alone where the sites have one adapter: sigma^4 r m n (1 / K - 1 / K^2)."""
    count, sigma = 8, 1.0
    found = {}
    for case in table.CASES[:2]:
        federation = table.Federation(case, [1.0] * count)
        found[case.strategy] = federation.measured(sigma, DRAWS)
    gap = found["fedex"][0] - found["fedit"][0]
    scaling = table.ALPHA / table.RANK
    want = scaling**2 * sigma**4 * table.RANK * table.M * table.N * (1 / count - 1 / count**2)
    assert abs(gap - want) < 5 * np.hypot(found["fedex"][1], found["fedit"][1])
    assert want > 20 * found["fedit"][1]


def test_without_noise_every_draw_is_the_same(table: ModuleType) -> None:
    for case in table.CASES:
        federation = table.Federation(case, WEIGHTS, unlike=True)
        assert np.linalg.norm(federation.zero) > 0
        assert federation.measured(0.0, 2)[0] <= 1e-20 * np.sum(federation.zero**2)
