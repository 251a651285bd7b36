"""Who a record is: digests that tell records and patients apart without regard to where they stand in a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import PrivateError


def record_digests(inputs: Sequence[Any], labels: np.ndarray | None, patients: Sequence[object] | None) -> list[bytes]:
    """SHA-256 of what each record holds; an input that is a path or an image stands for its bytes."""
    digests = []
    for index, value in enumerate(inputs):
        parts = (
            _content(value),
            b"" if labels is None else str(int(labels[index])).encode(),
            b"" if patients is None else str(patients[index]).encode(),
        )
        whole = hashlib.sha256()
        for part in parts:
            whole.update(len(part).to_bytes(8, "little") + part)
        digests.append(whole.digest())
    return digests


def _content(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return f"{value.mode}|{value.size}|".encode() + value.tobytes()
    if hasattr(value, "content"):
        return bytes(value.content())
    if not isinstance(value, Path):
        return str(value).encode()
    try:
        return value.read_bytes()
    except OSError as error:
        raise PrivateError(f"{value}: cannot be read: {error.strerror or error}") from None


def fingerprint(digests: Iterable[bytes]) -> str:
    """SHA-256 over a set of records, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def unit_keys(groups: Sequence[np.ndarray], digests: Sequence[bytes], patients: Sequence[object] | None) -> list[bytes]:
    """A key of each privacy unit that no other unit has a part in: its patient, or what its record holds.

    Of equal records the second is told from the first by its count, so that one more of them adds one more key.
    """
    if patients is not None:
        return [str(patients[group[0]]).encode() for group in groups]
    seen: Counter[bytes] = Counter()
    keys = []
    for group in groups:
        digest = digests[group[0]]
        keys.append(digest + seen[digest].to_bytes(8, "little"))
        seen[digest] += 1
    return keys
