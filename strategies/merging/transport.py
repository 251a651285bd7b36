"""MerA: align the units of adapters to those of the first by optimal transport, then average the factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..lowrank import Factors, norm, stacked
from .merger import Adapter, Context, Merged, Merger, merger
from .mixing import alone, assembled, changes, fitted, mean_rest, require_products, shares, started


@merger("mera")
class Mera(Merger):
    """A = sum_k p_k P_k A_k, B = sum_k p_k B_k P_k^T, P_k the permutation that moves the units of k onto the first's.

    A unit of a low-rank adapter is b_j a_j^T (column of B, row of A). The cost of moving one onto another is the
    squared distance of these rank-one matrices, |b|^2 |a|^2 + |b'|^2 |a'|^2 - 2 <b, b'><a, a'>, which does not hang on
    how a unit is split between its halves; then each is split evenly and takes the sign nearer to its partner. Between
    r and r units of equal mass the optimal transport is a permutation, so the assignment problem solves it. An adapter
    of smaller rank has units of zero. The mean of aligned factors keeps the rank, but it is no mean of the products;
    how far it is from that is noted. It hangs on which adapter is first. Source: He et al. 2023, "MerA", arXiv
    2308.15982, section 3 (on the weights; theirs are bottleneck adapters).
    """

    summary = "align rank-one units to the first adapter's by optimal transport, mean of the factors"
    equation = "P_k = argmin_P <P, C_k>, C_k[i, j] = |b_1i a_1i^T - b_kj a_kj^T|^2; A = sum p_k P_k A_k, B likewise"
    source = "He et al. 2023, arXiv 2308.15982"

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        products, moved = {}, dict.fromkeys(p, 0)
        apart = whole = 0.0
        for pair in context.spec.pairs:
            held = changes(adapters, pair, context)
            rank = context.spec.by_name[pair.a].shape[0]
            units = [_even(fitted(b, a, rank)[0]) for b, a in held]
            total_b, total_a = np.zeros_like(units[0][0]), np.zeros_like(units[0][1])
            for adapter, own in zip(adapters, units, strict=True):
                order, (b, a) = aligned(own, units[0])
                moved[adapter.name] += int(np.sum(order != np.arange(rank)))
                total_b += p[adapter.name] * b
                total_a += p[adapter.name] * a
            exact = stacked((p[adapter.name], *x) for adapter, x in zip(adapters, held, strict=True))
            apart += norm(stacked([(1.0, total_b, total_a), (-1.0, *exact)])) ** 2
            whole += norm(exact) ** 2
            start = started(pair, context)
            merged = (total_b, total_a)
            products[pair.a] = merged if start is None else stacked([(1.0, *merged), (1.0, *start)])
        state, lost = assembled(context.spec, products, mean_rest(adapters, p, context))
        reasons = {name: f"its weight; {count} of its units moved" for name, count in moved.items()}
        reasons[adapters[0].name] = "its weight; the others were aligned to it"
        far = np.sqrt(apart / whole) if whole > 0 else 0.0
        return Merged(state, p, reasons, lost, (f"the mean of the products is {far:.3f} away (relative Frobenius)",))


def _even(x: Factors) -> Factors:
    """The same units, each split into halves of equal length."""
    b, a = x
    left, right = np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)
    alive = (left > 0) & (right > 0)
    ratio = np.sqrt(np.divide(right, left, out=np.zeros_like(left), where=alive))
    return b * ratio, a * np.divide(1.0, ratio, out=np.zeros_like(ratio), where=alive)[:, None]


def aligned(x: Factors, reference: Factors) -> tuple[np.ndarray, Factors]:
    """Which unit of ``x`` goes to each unit of ``reference``, and ``x`` in that order, with signs to match."""
    (b, a), (to_b, to_a) = x, reference
    near = (to_b.T @ b) * (to_a @ a.T)  # inner products of the units
    own = np.sum(b**2, axis=0) * np.sum(a**2, axis=1)
    theirs = np.sum(to_b**2, axis=0) * np.sum(to_a**2, axis=1)
    _, order = linear_sum_assignment(theirs[:, None] + own[None, :] - 2 * near)
    b, a = b[:, order], a[order]
    signs = np.where(np.sum(b * to_b, axis=0) + np.sum(a * to_a, axis=1) < 0, -1.0, 1.0)
    return order, (b * signs, a * signs[:, None])
