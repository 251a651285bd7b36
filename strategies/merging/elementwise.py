"""Rules on single entries of dW, without holding dW: entries come in blocks of rows, out of the factors.

No more than a fixed number of entries is held at once, whatever the size of the layer, so memory does not grow with
m n; the arithmetic does, as the rules ask for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ...core.adapter import AdapterState
from ..lowrank import Factors
from .merger import Context
from .mixing import assembled, started

#: Entries that are held at once (8 MiB in float64).
HELD = 2**20
_OVERSAMPLING = 10
_PASSES = 30
_SETTLED = 1e-7
#: Bits of a magnitude that one pass of the selection looks at.
_DIGIT = 16


def blocks(m: int, n: int, matrices: int) -> list[slice]:
    """Runs of rows that together are ``m``, so short that those of ``matrices`` of width ``n`` can be held."""
    rows = max(1, HELD // max(1, n * matrices))
    return [slice(start, min(m, start + rows)) for start in range(0, m, rows)]


def entries(x: Factors, rows: slice) -> np.ndarray:
    """The rows of b @ a."""
    return x[0][rows] @ x[1]


def smallest_kept(matrices: Sequence[tuple[Factors, Sequence[slice]]], density: float) -> float:
    """The magnitude t such that a share ``density`` of all entries, rounded down but at least one, is not below t.

    Exact: a selection by digits of the magnitudes' bits, which are ordered as the numbers are. ``matrices``: each with
    its blocks, which must be those that its entries are later made in, so that rounding is the same.
    """
    total = sum(b.shape[0] * a.shape[1] for (b, a), _ in matrices)
    if not total:
        return 0.0
    wanted = max(1, int(density * total))  # this many of the largest

    def magnitudes() -> Iterable[np.ndarray]:
        for x, cuts in matrices:
            for cut in cuts:
                yield np.abs(entries(x, cut)).reshape(-1).view(np.int64)

    prefix = 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(2**_DIGIT, dtype=np.int64)
        for bits in magnitudes():
            inside = bits[(bits >> shift >> _DIGIT) == prefix] if shift + _DIGIT < 64 else bits
            counts += np.bincount((inside >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT)
        above = np.cumsum(counts[::-1])[::-1]  # entries whose digit is this one or larger
        digit = int(np.flatnonzero(above >= wanted)[-1])
        wanted -= int(above[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
        if counts[digit] <= HELD:
            held = np.concatenate([bits[(bits >> shift) == prefix] for bits in magnitudes()])
            prefix = int(np.partition(held, len(held) - wanted)[len(held) - wanted])
            break
    return float(np.array(prefix, dtype=np.int64).view(np.float64))


def trimmed(values: np.ndarray, least: float) -> np.ndarray:
    """``values`` with those of a magnitude below ``least`` set to zero."""
    return np.where(np.abs(values) >= least, values, 0.0)


def truncated(
    block: Callable[[slice], np.ndarray], cuts: Sequence[slice], n: int, rank: int, seed: int
) -> tuple[Factors, float, float]:
    """The nearest product of ``rank`` to the matrix whose rows ``block`` makes; and the squared norms lost and whole.

    A matrix that can be held is decomposed at once. Of a larger one the leading singular vectors are found by subspace
    iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), until the captured norm no longer grows, each pass
    making all blocks anew.
    """
    m = cuts[-1].stop
    if m * n <= HELD:
        u, s, vt = np.linalg.svd(np.concatenate([block(cut) for cut in cuts]), full_matrices=False)
        whole = float(np.sum(s**2))
    else:
        u, s, vt, whole = _leading(block, cuts, n, min(rank + _OVERSAMPLING, m, n), rank, seed)
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root, root[:, None] * vt[:rank]), max(0.0, whole - float(np.sum(s[:rank] ** 2))), whole


def by_rows(
    merged: Mapping[str, Callable[[slice], np.ndarray]],
    cuts: Mapping[str, Sequence[slice]],
    scale: float,
    rest: Mapping[str, np.ndarray],
    context: Context,
) -> tuple[AdapterState, float]:
    """The adapter whose changes of dW are ``scale`` times the rows of ``merged`` (by a pair's ``a``), cut to its rank.

    The dW of the common start is added to them; ``rest`` is what is no factor of a pair. Also the relative error that
    the rank brings.
    """
    products, missed, whole = {}, 0.0, 0.0
    for pair in context.spec.pairs:
        start, change = started(pair, context), merged[pair.a]

        def rows(
            cut: slice, change: Callable[[slice], np.ndarray] = change, start: Factors | None = start
        ) -> np.ndarray:
            return scale * change(cut) + (0.0 if start is None else entries(start, cut))

        rank, n = context.spec.by_name[pair.a].shape
        products[pair.a], lost, total = truncated(rows, cuts[pair.a], n, rank, context.seed)
        missed, whole = missed + lost, whole + total
    return assembled(context.spec, products, rest)[0], float(np.sqrt(missed / whole)) if whole > 0 else 0.0


def _leading(
    block: Callable[[slice], np.ndarray], cuts: Sequence[slice], n: int, width: int, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, width)))[0]
    captured, whole = -1.0, 0.0
    for turn in range(_PASSES):
        image = np.zeros((n, width))  # T^T T basis
        for cut in cuts:
            rows = block(cut)
            image += rows.T @ (rows @ basis)
            whole += float(np.sum(rows**2)) if turn == 0 else 0.0
        now = float(np.sum(np.linalg.eigvalsh(basis.T @ image)[-rank:]))
        basis = np.linalg.qr(image)[0]
        if now - captured <= _SETTLED * now:
            break
        captured = now
    u, s, right = np.linalg.svd(np.concatenate([block(cut) @ basis for cut in cuts]), full_matrices=False)
    return u, s, right @ basis.T, whole
