"""Entries in blocks of rows: exact selection, the same as a dense SVD, and memory that does not grow with the layer."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from fedgraft.strategies.lowrank import Factors
from fedgraft.strategies.merging import elementwise
from fedgraft.strategies.merging.elementwise import blocks, entries, smallest_kept, trimmed, truncated


def _product(m: int, n: int, rank: int, seed: int) -> Factors:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((m, rank)), draw.standard_normal((rank, n))


@pytest.mark.parametrize(("m", "n", "matrices"), [(1, 1, 1), (5, 7, 3), (100, 3, 2), (3, 10**7, 4)])
def test_blocks_are_all_rows_in_order(m: int, n: int, matrices: int) -> None:
    cuts = blocks(m, n, matrices)
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(m))
    assert all((cut.stop - cut.start) * n * matrices <= elementwise.HELD or cut.stop - cut.start == 1 for cut in cuts)


@pytest.mark.parametrize("held", [8, 64, 2**20])
@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
def test_the_smallest_kept_magnitude_is_that_of_a_sort(
    density: float, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "HELD", held)
    parts = [_product(13, 9, 2, 1), _product(4, 21, 3, 2)]
    least = smallest_kept([(x, blocks(x[0].shape[0], x[1].shape[1], 1)) for x in parts], density)
    every = np.sort(np.abs(np.concatenate([(b @ a).reshape(-1) for b, a in parts])))[::-1]
    assert least == pytest.approx(every[max(1, int(density * every.size)) - 1], rel=1e-12)


@pytest.mark.parametrize("held", [8, 2**20])
def test_ties_of_magnitude_are_all_kept(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "HELD", held)
    x = (np.array([[1.0], [-1.0], [0.0], [2.0]]), np.array([[3.0, -3.0, 3.0]]))
    least = smallest_kept([(x, blocks(4, 3, 1))], 4 / 12)
    assert least == 3.0
    assert np.count_nonzero(trimmed(x[0] @ x[1], least)) == 9
    assert smallest_kept([(x, blocks(4, 3, 1))], 1.0) == 0.0
    assert smallest_kept([((np.zeros((3, 1)), np.zeros((1, 2))), blocks(3, 2, 1))], 0.5) == 0.0
    assert smallest_kept([], 0.5) == 0.0


@pytest.mark.parametrize(("m", "n"), [(40, 60), (60, 40), (8, 50), (50, 3)])
@pytest.mark.parametrize("held", [64, 2**20])
def test_the_truncation_is_that_of_a_dense_svd(
    m: int, n: int, held: int, monkeypatch: pytest.MonkeyPatch, zoo: Any
) -> None:
    """Of a sparse sum of full rank, as TIES makes it, in one block or in many."""
    monkeypatch.setattr(elementwise, "HELD", held)
    x = _product(m, n, 6, 3)
    dense = trimmed(x[0] @ x[1], 1.5)
    made = []

    def block(cut: slice) -> np.ndarray:
        made.append(cut)
        return dense[cut]

    (b, a), missed, whole = truncated(block, blocks(m, n, 2), n, 4, seed=0)
    want = zoo.cut(dense, 4)
    assert whole == pytest.approx(np.sum(dense**2), rel=1e-10)
    best = float(np.sum((dense - want) ** 2))
    # An SVD is the nearest; subspace iteration may stay above it by what it has not settled.
    assert best * (1 - 1e-9) - 1e-9 <= np.sum((dense - b @ a) ** 2) <= best * (1 + 1e-5) + 1e-9
    assert missed == pytest.approx(np.sum((dense - b @ a) ** 2), rel=1e-6, abs=1e-9)
    if held == 2**20:
        np.testing.assert_allclose(b @ a, want, atol=1e-10)
        assert len(made) == len(blocks(m, n, 2))


def test_memory_does_not_grow_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "HELD", 2**16)
    m = n = 2000
    x = _product(m, n, 4, 5)
    cuts = blocks(m, n, 2)
    tracemalloc.start()
    least = smallest_kept([(x, cuts)], 0.2)
    truncated(lambda cut: trimmed(entries(x, cut), least), cuts, n, 4, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.25 * 8 * m * n  # a dense layer is 32 MB
