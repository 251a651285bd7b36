"""Sums of many low-rank matrices in memory that does not grow with their number: stacked while few, sketched when many.

A sketch is linear in the matrix and drawn from a public seed: the sketch of a sum is the sum of the sketches, whoever
adds them up and in whatever order.
"""

from __future__ import annotations

import numpy as np

from .lowrank import Factors, stacked

#: Columns of a sketch for each rank that is wanted of the sum. With 5 the rest that a truncation to that rank leaves
#: is about a fifth larger than the least possible.
COLUMNS = 5
_FEWEST = 16
_SEED = 0x5EED


def gaussian(rows: int, columns: int, *key: int) -> np.ndarray:
    """A matrix of independent standard normal numbers that everybody who knows ``key`` can draw."""
    return np.random.default_rng([_SEED, *key, rows, columns]).standard_normal((rows, columns))


class TestMatrices:
    """The random matrices of sketches, drawn once for all pairs of one shape."""

    __test__ = False

    def __init__(self, *key: int) -> None:
        self._key = key
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, rows: int, columns: int) -> np.ndarray:
        if (rows, columns) not in self._drawn:
            self._drawn[rows, columns] = gaussian(rows, columns, *self._key)
        return self._drawn[rows, columns]


class ProductSum:
    """sum_k w_k b_k a_k over terms of shape (m, n) and any rank, as factors that are enough for its rank-``rank`` part.

    As long as a stack of all terms (in float32) takes no more memory than the sketch would, up to a total rank of about
    40 ``rank``, it is kept, and nothing is lost. From then on a sketch is kept: Y = X Omega (m, k) and Z = Psi X
    (l, n), with Gaussian Omega and Psi, k = ``columns`` * ``rank`` and l = 3 k + 1. Then X is about Q (Psi Q)^+ Z, with
    Q an orthonormal basis of Y. That is exact where X has rank at most k; else its best rank-``rank`` part misses X by
    somewhat more than the best of X does. Where a side of X is no longer than k + l, X itself is smaller, and exact.

    Source: Tropp, Yurtsever, Udell and Cevher 2017, "Practical sketching algorithms for low-rank matrix approximation",
    arXiv 1609.00048, Algorithms 1, 4 and 7.
    """

    def __init__(self, m: int, n: int, rank: int, draw: TestMatrices, columns: int = COLUMNS) -> None:
        self.shape = (m, n)
        self.width = max(_FEWEST, columns * rank)
        self.height = 3 * self.width + 1
        #: The total rank up to which terms are stacked.
        self.cap = 2 * (self.width + self.height)
        self._batch = max(_FEWEST, 16 * rank)
        self._draw = draw
        self._terms: list[tuple[float, np.ndarray, np.ndarray]] = []
        self._stacked = 0
        self._whole: np.ndarray | None = None
        self._y: np.ndarray | None = None
        self._z: np.ndarray | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing was lost so far."""
        return self._y is None

    def add(self, weight: float, b: np.ndarray, a: np.ndarray) -> None:
        """Add ``weight`` b @ a. The arrays are kept for a while: they must not change."""
        self._terms.append((weight, b, a))
        self._stacked += len(a)
        if self._stacked > (self.cap if self._y is None and self._whole is None else self._batch):
            self._fold()

    def _fold(self) -> None:
        """Take the stack into the sketch, or into the whole where that is smaller."""
        b, a = stacked(self._terms)
        self._terms, self._stacked = [], 0
        m, n = self.shape
        if min(m, n) <= self.width + self.height:
            self._whole = b @ a if self._whole is None else self._whole + b @ a
            return
        if self._y is None or self._z is None:
            self._y, self._z = np.zeros((m, self.width)), np.zeros((self.height, n))
        self._y += b @ (a @ self._draw(n, self.width))
        self._z += (self._draw(self.height, m) @ b) @ a

    def factors(self) -> Factors:
        """b (m, R) and a (R, n) with b @ a the sum, or what the sketch knows of it."""
        m, n = self.shape
        if self._y is None and self._whole is None:
            return stacked(self._terms) if self._terms else (np.zeros((m, 0)), np.zeros((0, n)))
        if self._terms:
            self._fold()
        if self._whole is not None:
            return (self._whole, np.eye(n)) if n <= m else (np.eye(m), self._whole)
        if self._y is None or self._z is None:
            raise ValueError("a sketch is neither whole nor begun")
        q, _ = np.linalg.qr(self._y)
        known, triangle = np.linalg.qr(self._draw(self.height, m) @ q)
        return q, np.linalg.solve(triangle, known.T @ self._z)
