"""Which records a step sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def poisson_batch(groups: Sequence[np.ndarray], rate: float, stream: RandomStream) -> np.ndarray:
    """Each unit with probability ``rate``, independently; a sampled unit gives one of its records, uniformly.

    One record a unit and step, so the gradient rows of the batch are units and clipping a row clips a unit.

    Guarantee
    ---------
    Add/remove of one unit changes the sampled multiset by at most that unit's one record: exactly the Poisson
    subsampling of :mod:`fedgraft.privacy.accounting` when ``stream`` is unpredictable to whoever sees the output.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a sampling rate of {rate} is not in (0, 1]")
    chosen: list[int] = np.flatnonzero(stream.uniform(len(groups)) < rate).tolist()
    if not chosen:
        return np.empty(0, dtype=np.int64)
    picks = stream.below(np.array([len(groups[unit]) for unit in chosen]))
    return np.array([groups[unit][pick] for unit, pick in zip(chosen, picks, strict=True)])


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
