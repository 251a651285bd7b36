"""Which records a step sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import UserError
from .noise import RandomStream


def group_by_unit(keys: Sequence[object] | None, records: int) -> list[np.ndarray]:
    """Record indices of each privacy unit: by key, or each record by itself when ``keys`` is None.

    Raises :class:`UserError` for a missing key (None, NaN, empty text): who a record belongs to must be known, or one
    person's records could count as several units.
    """
    if keys is None:
        return [np.array([index]) for index in range(records)]
    if len(keys) != records:
        raise UserError(f"{len(keys)} patient keys for {records} records")
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        if key is None or key != key or (isinstance(key, str) and not key.strip()):
            raise UserError(f"record {index} has no patient key; every record needs one to protect patients")
        groups.setdefault(key, []).append(index)
    return [np.array(indices) for indices in groups.values()]


def shares(keys: Sequence[bytes], *purpose: object) -> np.ndarray:
    """A number in [0, 1) for each key, as good as uniform, that hangs on the key and ``purpose`` alone.

    What is decided by it for one unit (which part it is in, at which step its turn comes) never moves when another
    unit is added or removed.
    """
    salt = hashlib.sha256("|".join(map(repr, purpose)).encode()).digest()
    words = b"".join(hashlib.sha256(salt + key).digest()[:8] for key in keys)
    return (np.frombuffer(words, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Sample:
    """What one step sees: ``records``, and of each the position of its unit in the sample, both shape (R,)."""

    records: np.ndarray
    units: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """How many records each unit gives."""
        return np.bincount(self.units) if len(self.units) else np.empty(0, dtype=np.int64)


def draw(
    groups: Sequence[np.ndarray],
    rate: float,
    stream: RandomStream,
    *,
    records_per_unit: int = 1,
    max_units: int = 0,
    candidates: np.ndarray | None = None,
) -> Sample:
    """Each unit with probability ``rate``, independently; a sampled unit gives up to ``records_per_unit`` records.

    Which of its records is uniform without replacement. ``max_units``: a larger sample is cut down to so many, at
    random; 0: it never is. ``candidates``: the units (positions in ``groups``) whose turn it is; None: all.

    Guarantee
    ---------
    Add/remove of one unit changes the sample by at most that unit's records, which carry its number, so that clipping
    their summed gradient once bounds the unit. Exactly the Poisson (or truncated Poisson) subsampling of
    :mod:`fedgraft.privacy.accounting` when ``stream`` is unpredictable to whoever sees the output.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a sampling rate of {rate} is not in (0, 1]")
    pool = np.arange(len(groups)) if candidates is None else candidates
    chosen = pool[stream.uniform(len(pool)) < rate]
    if max_units and len(chosen) > max_units:
        chosen = np.sort(chosen[stream.permutation(len(chosen))[:max_units]])
    records: list[np.ndarray] = []
    for unit in chosen.tolist():
        own = groups[unit]
        if len(own) > records_per_unit:
            own = own[stream.permutation(len(own))[:records_per_unit]]
        records.append(own)
    if not records:
        return Sample(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    return Sample(np.concatenate(records), np.repeat(np.arange(len(records)), [len(own) for own in records]))


def shuffled_batches(records: int, batch: int, stream: RandomStream) -> Iterator[np.ndarray]:
    """Batches of ``batch`` records, epoch after epoch in a fresh order, without end. Promises no privacy."""
    if records < 1:
        raise UserError("there are no records to train on")
    queue = np.empty(0, dtype=np.int64)
    batch = min(batch, records)
    while True:
        while len(queue) < batch:
            queue = np.concatenate([queue, stream.permutation(records)])
        yield queue[:batch]
        queue = queue[batch:]
