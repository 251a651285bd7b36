"""What an adapter has changed by, as one vector: what the sites add up, and what the server moves the adapter by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.adapter import AdapterState


def change(state: AdapterState, start: AdapterState, names: Sequence[str]) -> np.ndarray:
    """state - start over the tensors ``names``, one after the other, flat in float64."""
    parts = [(state[name].astype(np.float64) - start[name].astype(np.float64)).reshape(-1) for name in names]
    return np.concatenate([np.zeros(0), *parts])


def moved(start: AdapterState, by: np.ndarray, names: Sequence[str]) -> AdapterState:
    """The tensors ``names`` of ``start``, moved by the flat ``by``, in their own dtypes."""
    tensors, at = {}, 0
    for name in names:
        array = start[name]
        step = by[at : at + array.size].reshape(array.shape)
        tensors[name] = (array.astype(np.float64) + step).astype(array.dtype)
        at += array.size
    return AdapterState(start.spec, tensors, names=tuple(names))
