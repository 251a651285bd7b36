"""Keeps the memory that a pass frees: to give it back to the system and fetch it again for the next pass costs time."""

from __future__ import annotations

import ctypes
from functools import cache

# Of glibc's malloc.h. The first is the most that it takes, and from there on memory comes from the system each time.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST, _KEPT = 32 * 2**20, 2**28


@cache
def keep_freed() -> None:
    """Have this process hold on to up to 256 MiB of freed memory; without glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEPT)
