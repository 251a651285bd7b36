"""Arithmetic on low-rank matrices as factors: products, inner products and SVDs without a matrix of the full size.

A matrix of shape (m, n) is held as ``b`` (m, r) and ``a`` (r, n), for b @ a. Everything is computed in float64. Costs
grow with r (m + n), never with m n.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..core.adapter import AdapterState, LowRankPair, offset_a, offset_b

Factors = tuple[np.ndarray, np.ndarray]


def stacked(terms: Iterable[tuple[float, np.ndarray, np.ndarray]]) -> Factors:
    """The factors of sum_k w_k b_k a_k, for ``terms`` (w_k, b_k, a_k) of one (m, n): [w_1 b_1 ...] and [a_1; ...]."""
    held = list(terms)
    left = np.concatenate([w * b.astype(np.float64) for w, b, _ in held], axis=1)
    return left, np.concatenate([a.astype(np.float64) for _, _, a in held], axis=0)


def effective(state: AdapterState, pair: LowRankPair) -> Factors:
    """The factors of the whole dW of ``pair``: its scaling in ``b``, and the change of the base weights with it."""
    terms = [(pair.scaling, state[pair.b], state[pair.a])]
    if offset_a(pair) in state:
        terms.append((1.0, state[offset_b(pair)], state[offset_a(pair)]))
    return stacked(terms)


def svd(b: np.ndarray, a: np.ndarray, rank: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``rank`` largest singular triples of b @ a: U (m, k), S (k), V^T (k, n), with k = min(rank, m, n, r).

    QR of both factors, then the SVD of the small core. Leading axes are a batch. The entry of the largest size in each
    row of V^T is positive, so that the result is a function of the product. Triples of singular value zero are
    orthonormal too.
    """
    left_q, left_r = np.linalg.qr(b.astype(np.float64, copy=False))
    right_q, right_r = np.linalg.qr(np.swapaxes(a, -1, -2).astype(np.float64, copy=False))
    u, s, vt = np.linalg.svd(left_r @ np.swapaxes(right_r, -1, -2), full_matrices=False)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    u, vt = left_q @ u, vt @ np.swapaxes(right_q, -1, -2)
    largest = np.take_along_axis(vt, np.abs(vt).argmax(axis=-1, keepdims=True), axis=-1)
    signs = np.where(largest < 0, -1.0, 1.0)
    return u * np.swapaxes(signs, -1, -2), s, vt * signs


def inner(x: Factors, y: Factors) -> float:
    """<b_x a_x, b_y a_y> = tr((b_y^T b_x)(a_x a_y^T)), at a cost of r^2 (m + n)."""
    (bx, ax), (by, ay) = x, y
    left = bx.T.astype(np.float64) @ by.astype(np.float64)
    return float(np.sum(left * (ax.astype(np.float64) @ ay.T.astype(np.float64))))


def norm(x: Factors) -> float:
    """The Frobenius norm of b @ a."""
    return float(np.sqrt(max(0.0, inner(x, x))))


def completed(vt: np.ndarray, rows: np.ndarray, rank: int) -> np.ndarray:
    """``vt`` (k, n) of orthonormal rows, with further ones up to ``rank`` out of the span of ``rows``.

    So a factor whose partner is zero stays of full rank, and both can be trained. Where ``rank`` exceeds n, the last
    rows are zero.
    """
    have, n = vt.shape
    if have >= rank:
        return vt[:rank]
    q = np.linalg.qr(np.concatenate([vt, rows.astype(np.float64)]).T)[0].T
    full = np.zeros((rank, n))
    found = q[have : min(rank, n)]
    full[:have] = vt
    full[have : have + len(found)] = found
    return full
