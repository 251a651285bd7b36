"""Masks: the stream of AES-256 in counter mode under a key, read as integers and added modulo 2^32 or 2^64."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

#: Bytes at a time, so that the stream stays in the processor's cache.
_BLOCK = 1 << 16
_ZEROS = memoryview(bytes(_BLOCK))


def add_mask(total: np.ndarray, key: bytes, sign: int) -> None:
    """Add the mask of ``key`` to ``total`` (n,) of little-endian uint32 or uint64, in place; ``sign`` -1 takes it off.

    A key is for one mask: the counter starts at zero.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(_BLOCK + 16)
    words = np.frombuffer(buffer, total.dtype, _BLOCK // total.dtype.itemsize)
    for start in range(0, total.size, words.size):
        part = total[start : start + words.size]
        stream.update_into(_ZEROS[: part.nbytes], buffer)
        (np.add if sign > 0 else np.subtract)(part, words[: part.size], out=part)


def sign_between(own: str, other: str) -> int:
    """+1 for the site whose name comes first, -1 for the other, so that their masks cancel."""
    return 1 if own < other else -1
