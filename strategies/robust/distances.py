"""How far a site moved the adapter: changes of dW held as factors, and their inner products, norms and steps.

The factors of two sites may differ where their dW are equal (B Q and Q^-1 A), so a distance between factors tells
little. All distances here are between the changes of the effective weights: of dW = s B A for a low-rank pair, of the
numbers themselves for every other tensor. No matrix of the size of a weight is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from ...core.adapter import AdapterState, LowRankPair
from ..lowrank import Factors, inner, stacked


@dataclass(frozen=True)
class Change:
    """What a site changed: of each low-rank pair the factors of dW_k - dW_0, of other tensors the difference.

    Keys are a pair's ``a``, or a tensor's name.
    """

    pairs: Mapping[str, Factors]
    others: Mapping[str, np.ndarray]


def change(received: AdapterState, sent: AdapterState) -> Change:
    """The change from ``received``, which the site trained from, to ``sent``, which holds its shared tensors.

    dW_k - dW_0 = s (B_k - B_0) A_k + s B_0 (A_k - A_0), so that nothing cancels where a site moved little. A factor
    that is frozen stays as it is. One that the site keeps for itself is not known here: then there is no dW to speak
    of, and the other factor counts by its numbers.
    """
    pairs, others = {}, {}
    whole = [pair for pair in sent.spec.pairs if _known(sent, pair)]
    for pair in whole:
        start, step = _factors(received, pair), _step(received, sent, pair)
        terms = []
        if pair.b in sent:
            terms.append((pair.scaling, step[0], start[1] + step[1]))
        if pair.a in sent:
            terms.append((pair.scaling, start[0], step[1]))
        pairs[pair.a] = stacked(terms)
    factors = {name for pair in whole for name in (pair.a, pair.b)}
    for name in sent:
        if name not in factors:
            others[name] = _difference(received, sent, name)
    return Change(pairs, others)


def gram(changes: Sequence[Change]) -> np.ndarray:
    """Inner products of all pairs of ``changes``, (K, K); ranks may differ."""
    count = len(changes)
    total = np.zeros((count, count))
    if not count:
        return total
    for key in changes[0].pairs:
        left, right = stacked((1.0, *one.pairs[key]) for one in changes)
        ends = np.cumsum([one.pairs[key][1].shape[0] for one in changes])
        for row, end in enumerate(ends):
            # One block row at a time: the traces of all pairs of sites at once would be (K r)^2 numbers.
            own = slice(end - changes[row].pairs[key][1].shape[0], end)
            columns = ((left[:, own].T @ left) * (right[own] @ right.T)).sum(axis=0)
            total[row] += np.add.reduceat(columns, [0, *ends[:-1]])
    for key in changes[0].others:
        rows = np.stack([one.others[key].reshape(-1) for one in changes])
        total += rows @ rows.T
    return (total + total.T) / 2


def squared_distances(products: np.ndarray) -> np.ndarray:
    """|D_i - D_j|^2 of all pairs, from their inner products; exactly zero on the diagonal."""
    own = np.diag(products)
    squares = np.maximum(own[:, None] + own[None, :] - 2 * products, 0.0)
    np.fill_diagonal(squares, 0.0)
    return squares


def norm(one: Change) -> float:
    """|D|: the length of a change."""
    squares = sum(max(0.0, inner(factors, factors)) for factors in one.pairs.values())
    squares += sum(float(np.vdot(array, array)) for array in one.others.values())
    return float(np.sqrt(squares))


@dataclass(frozen=True)
class Path:
    """The way of the factors from ``received`` to ``sent`` in a straight line: after a part c of it,

        |dW(c) - dW_0|^2 = a c^2 + 2 b c^3 + d c^4,     dW(c) - dW_0 = c U + c^2 V,

    with U = s (dB A_0 + B_0 dA) and V = s dB dA, a = |U|^2 and the squares of other tensors, b = <U, V>, d = |V|^2.
    """

    a: float
    b: float
    d: float

    @classmethod
    def between(cls, received: AdapterState, sent: AdapterState) -> Path:
        a = b = d = 0.0
        factors: set[str] = set()
        for pair in sent.spec.pairs:
            if not _known(sent, pair):
                continue
            factors |= {pair.a, pair.b}
            (b0, a0), (db, da) = _factors(received, pair), _step(received, sent, pair)
            straight = stacked([(pair.scaling, db, a0), (pair.scaling, b0, da)])
            bent = stacked([(pair.scaling, db, da)])
            a += inner(straight, straight)
            b += inner(straight, bent)
            d += inner(bent, bent)
        for name in sent:
            if name not in factors:
                difference = _difference(received, sent, name)
                a += float(np.vdot(difference, difference))
        return cls(max(a, 0.0), b, max(d, 0.0))

    def length(self, c: float) -> float:
        """|dW(c) - dW_0|."""
        return float(np.sqrt(max(0.0, c * c * (self.a + c * (2 * self.b + c * self.d)))))

    def reach(self, length: float) -> float:
        """The first c > 0 at which the change has the given length; infinite where it never has."""
        # The length rises and falls between the roots of its derivative, 2 c (a + 3 b c + 2 d c^2), and nowhere else.
        start, stops = 0.0, sorted(c for c in _roots(2 * self.d, 3 * self.b, self.a) if c > 0)
        for stop in stops:
            if self.length(stop) >= length:
                return self._crossing(start, stop, length)
            start = stop
        if self.a == 0 and self.d == 0:
            return float("inf")
        stop = max(2 * start, 1.0)
        while self.length(stop) < length:
            stop *= 2
        return self._crossing(start, stop, length)

    def _crossing(self, low: float, high: float, length: float) -> float:
        if self.length(high) == length:
            return high
        return float(brentq(lambda c: self.length(c) - length, low, high, xtol=1e-300, rtol=1e-14, maxiter=2000))


def moved(received: AdapterState, sent: AdapterState, part: float) -> AdapterState:
    """``sent`` at ``part`` of the way from ``received``: theta_0 + c (theta_k - theta_0), for every tensor sent."""
    if part == 1:
        return sent
    values = {
        name: (received[name].astype(np.float64) + part * _difference(received, sent, name)).astype(sent[name].dtype)
        for name in sent
    }
    return AdapterState(sent.spec, values, names=tuple(sent)).require_finite()


def _known(sent: AdapterState, pair: LowRankPair) -> bool:
    """Whether both factors of ``pair`` are known to the server, and one of them came back."""
    own = sent.spec.by_name
    known = all(name in sent or own[name].policy == "freeze" for name in (pair.a, pair.b))
    return known and (pair.a in sent or pair.b in sent)


def _factors(state: AdapterState, pair: LowRankPair) -> Factors:
    return state[pair.b].astype(np.float64), state[pair.a].astype(np.float64)


def _step(received: AdapterState, sent: AdapterState, pair: LowRankPair) -> Factors:
    """What was added to the factors; zero for one that does not train."""
    b, a = (
        _difference(received, sent, name) if name in sent else np.zeros(received[name].shape)
        for name in (pair.b, pair.a)
    )
    return b, a


def _difference(received: AdapterState, sent: AdapterState, name: str) -> np.ndarray:
    return sent[name].astype(np.float64) - received[name].astype(np.float64)


def _roots(x: float, y: float, z: float) -> tuple[float, ...]:
    """The real roots of x c^2 + y c + z."""
    if x == 0:
        return (-z / y,) if y else ()
    under = y * y - 4 * x * z
    if under < 0:
        return ()
    # The root without cancellation first, the other from their product.
    q = -(y + np.copysign(np.sqrt(under), y)) / 2
    return (q / x, z / q) if q else (0.0,)
