"""Fewer bytes for an upload: int8 by stochastic rounding, the largest numbers alone, and lossless coding of the rest.

Both lossy forms are made of what a site would send anyway, so under differential privacy they are post-processing.
"""

from __future__ import annotations

import zlib

import numpy as np

from .errors import UserError

_LEVELS = 127


def quantise(change: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """``change`` as int8 and the step s between two levels, so that E[s q] = change, elementwise.

    s = max|change| / 127, and each number is rounded up with the probability that makes its mean right. Source:
    Alistarh et al. 2017 (QSGD), arXiv 1610.02132, with the largest number in place of the norm.
    """
    wide = change.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    # The step travels as float64; one that were subnormal would lose the levels.
    if largest < np.finfo(np.float32).tiny:
        return np.zeros(change.shape, dtype=np.int8), 0.0
    step = largest / _LEVELS
    levels = np.floor(wide / step + random.random(change.shape))
    return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), step


def restored(levels: np.ndarray, step: float) -> np.ndarray:
    """The inverse of :func:`quantise`, in float64."""
    return levels.astype(np.float64) * step


def largest(change: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions (uint32, ascending) and values of the ``fraction`` of ``change`` (flat) that is largest in magnitude.

    At least one; ties fall to the lower position, so that the choice is a function of the numbers alone.
    """
    count = max(1, round(fraction * change.size))
    order = np.argsort(-np.abs(change), kind="stable")[:count]
    at = np.sort(order)
    return at.astype(np.uint32), change[at]


def coded(array: np.ndarray) -> bytes:
    """``array`` losslessly compressed: the bytes of each significance together, then DEFLATE (RFC 1951)."""
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(-1)
    planes = plain.view(np.uint8).reshape(-1, array.dtype.itemsize).T
    return zlib.compress(np.ascontiguousarray(planes).tobytes(), level=6)


def decoded(content: bytes | memoryview, dtype: np.dtype, size: int) -> np.ndarray:
    """The ``size`` numbers that :func:`coded` packed. Never inflates more than they take.

    Raises :class:`UserError` when ``content`` is anything else.
    """
    expected = size * dtype.itemsize
    machine = zlib.decompressobj()
    try:
        plain = machine.decompress(content, expected + 1)
    except zlib.error as error:
        raise UserError(f"a compressed array cannot be read: {error}") from None
    if len(plain) != expected or not machine.eof or machine.unused_data:
        raise UserError(f"a compressed array does not hold the {size} numbers that it should")
    planes = np.frombuffer(plain, dtype=np.uint8).reshape(dtype.itemsize, size)
    little = np.ascontiguousarray(planes.T).reshape(-1).view(dtype.newbyteorder("<"))
    return little.astype(dtype, copy=False)
