"""Changes of an adapter in float64: what a site's training added, and an adapter moved by a sum of such."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..core.adapter import AdapterState, explain_shape
from ..core.errors import UserError


def change(state: AdapterState, start: AdapterState, factor: float = 1.0) -> AdapterState:
    """factor (state - start), in float64, for the tensors of ``state``; those that are no parameters come as they are.

    Raises :class:`UserError` that names a tensor which ``start`` does not have, or has in another shape.
    """
    tensors = {}
    for name, array in state.items():
        wide = array.astype(np.float64)
        if not state.spec.by_name[name].parameter:
            tensors[name] = wide
            continue
        if name not in start:
            raise UserError(f"unknown tensor {name}")
        if array.shape != start[name].shape:
            raise UserError(explain_shape(name, array.shape, start[name].shape))
        tensors[name] = factor * (wide - start[name].astype(np.float64))
    spec = replace(state.spec, tensors=tuple(replace(tensor, dtype="float64") for tensor in state.spec.tensors))
    return AdapterState(spec, tensors, names=tuple(state))


def moved(start: AdapterState, by: AdapterState, factor: float = 1.0) -> AdapterState:
    """start + factor by, in the dtypes of ``start``, for the parameters that ``by`` holds."""
    names = [name for name in by if by.spec.by_name[name].parameter]
    tensors = {
        name: (start[name].astype(np.float64) + factor * by[name].astype(np.float64)).astype(start[name].dtype)
        for name in names
    }
    return AdapterState(start.spec, tensors, names=names).require_finite()
