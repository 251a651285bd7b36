"""Tensors of an adapter as one vector: what is clipped, noised or added up as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .adapter import AdapterState


def flat(state: AdapterState, names: Sequence[str]) -> np.ndarray:
    """The tensors ``names`` of ``state``, one after the other, in float64."""
    parts = [state[name].astype(np.float64).reshape(-1) for name in names]
    return np.concatenate(parts) if parts else np.zeros(0)


def moved(state: AdapterState, names: Sequence[str], by: np.ndarray) -> AdapterState:
    """The tensors ``names`` of ``state``, moved by the flat ``by``, in their own dtypes."""
    tensors, at = {}, 0
    for name in names:
        array = state[name]
        step = by[at : at + array.size].reshape(array.shape)
        tensors[name] = (array.astype(np.float64) + step).astype(array.dtype)
        at += array.size
    return AdapterState(state.spec, tensors, names=tuple(names))
