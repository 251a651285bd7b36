"""Sums of products in bounded memory: lossless while few, the theorem's error when many."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedgraft.strategies.lowrank import svd
from fedgraft.strategies.sketching import ProductSum, TestMatrices, gaussian


def _terms(count: int, m: int, n: int, r: int, *, common: float = 1.0, seed: int = 0) -> list[tuple[float, ...]]:
    """Sites that drifted from one start."""
    random = np.random.default_rng(seed)
    b0, a0 = common * random.standard_normal((m, r)), common * random.standard_normal((r, n))
    return [
        (float(random.uniform(0.5, 2)), b0 + random.standard_normal((m, r)), a0 + random.standard_normal((r, n)))
        for _ in range(count)
    ]


def _filled(terms: list, m: int, n: int, rank: int, key: int = 0) -> ProductSum:
    total = ProductSum(m, n, rank, TestMatrices(key))
    for term in terms:
        total.add(*term)
    return total


def _dense(terms: list) -> np.ndarray:
    return sum(w * b.astype(np.float64) @ a.astype(np.float64) for w, b, a in terms)


def test_nothing_is_lost_up_to_the_cap() -> None:
    m, n, r = 300, 250, 3
    total = ProductSum(m, n, r, TestMatrices())
    terms = _terms(total.cap // r, m, n, r)
    for term in terms:
        total.add(*term)
    assert total.exact
    b, a = total.factors()
    np.testing.assert_allclose(b @ a, _dense(terms), rtol=1e-12, atol=1e-10)


def test_a_sum_of_low_rank_survives_the_sketch() -> None:
    """All sites share A, as with a frozen factor: the sum of a hundred has rank r."""
    m, n, r = 260, 240, 4
    random = np.random.default_rng(3)
    a = random.standard_normal((r, n)).astype(np.float32)
    terms = [(0.3, random.standard_normal((m, r)).astype(np.float32), a) for _ in range(100)]
    total = _filled(terms, m, n, r)
    assert not total.exact
    u, s, vt = svd(*total.factors(), r)
    want = _dense(terms)
    assert np.linalg.norm((u * s) @ vt - want) < 1e-10 * np.linalg.norm(want)


def test_the_mean_squared_error_of_the_sketch_is_within_the_theorem() -> None:
    """Tropp et al. 2017: E |X - X'|^2 <= (1 + k / (l - k - 1)) min_p (1 + p / (k - p - 1)) tau_{p+1}^2."""
    m, n, r = 240, 230, 2
    terms = _terms(80, m, n, r, common=2.0)
    want = _dense(terms)
    values = np.linalg.svd(want, compute_uv=False)
    errors = []
    for key in range(20):
        total = _filled(terms, m, n, r, key)
        assert not total.exact
        b, a = total.factors()
        errors.append(float(np.linalg.norm(b @ a - want) ** 2))
    k, high = total.width, total.height
    tails = [float((values[p:] ** 2).sum()) for p in range(k - 1)]
    bound = (1 + k / (high - k - 1)) * min((1 + p / (k - p - 1)) * tails[p] for p in range(k - 1))
    # Twenty draws of a concentrated quantity: their mean is within a twentieth of the expectation.
    assert np.mean(errors) <= 1.05 * bound
    assert np.mean(errors) >= 0.2 * bound, "far below the bound: not the algorithm of the theorem"


@pytest.mark.parametrize("common", [0.2, 1.0, 3.0])
def test_the_truncation_of_a_sketch_loses_little_more_than_the_best_one(common: float) -> None:
    m, n, r = 300, 320, 4
    terms = _terms(100, m, n, r, common=common)
    want = _dense(terms)
    values = np.linalg.svd(want, compute_uv=False)
    best = float(np.sqrt((values[r:] ** 2).sum()))
    errors = []
    for key in range(5):
        total = _filled(terms, m, n, r, key)
        assert not total.exact
        u, s, vt = svd(*total.factors(), r)
        errors.append(float(np.linalg.norm((u * s) @ vt - want)))
    assert best <= min(errors) and np.mean(errors) <= 1.25 * best and max(errors) <= 1.4 * best


def test_order_and_division_of_the_terms_do_not_matter() -> None:
    m, n, r = 200, 190, 2
    terms = _terms(90, m, n, r)
    b, a = _filled(terms, m, n, r).factors()
    halves = [(w / 2, left, right) for w, left, right in terms for _ in range(2)]
    for other in (terms[::-1], halves):
        left, right = _filled(other, m, n, r).factors()
        np.testing.assert_allclose(left @ right, b @ a, atol=1e-9 * np.abs(b @ a).max())


def test_a_short_side_is_kept_whole_and_exact() -> None:
    for m, n in ((40, 900), (900, 40)):
        terms = _terms(60, m, n, 3)
        total = _filled(terms, m, n, 3)
        assert total.exact
        b, a = total.factors()
        np.testing.assert_allclose(b @ a, _dense(terms), rtol=1e-11, atol=1e-9)


def test_memory_does_not_grow_with_the_number_of_terms() -> None:
    m, n, r = 1500, 1400, 2

    def peak(count: int) -> int:
        random = np.random.default_rng(1)
        tracemalloc.start()
        total = ProductSum(m, n, r, TestMatrices())
        for _ in range(count):
            total.add(1.0, random.standard_normal((m, r)), random.standard_normal((r, n)))
        total.factors()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(80), peak(400)
    assert many < 1.1 * few
    assert many < m * n * 8 / 2


def test_everybody_draws_the_same_matrices_from_the_key() -> None:
    assert np.array_equal(TestMatrices(4)(7, 3), gaussian(7, 3, 4))
    assert not np.array_equal(gaussian(7, 3, 4), gaussian(7, 3, 5))
    assert abs(gaussian(300, 300).std() - 1) < 0.02


def test_an_empty_sum_is_zero() -> None:
    b, a = ProductSum(4, 5, 2, TestMatrices()).factors()
    assert (b @ a).shape == (4, 5) and not (b @ a).any()
