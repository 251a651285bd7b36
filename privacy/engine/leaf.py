"""The way for a layer that no rule fits: each example goes through it alone, past trainables of its own.

Right by construction for whatever keeps its examples apart, and slow: the layer runs once an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .rows import ParameterSlot, Rows
from .rules import RowLeaf


def one_by_one(
    module: nn.Module,
    forward: Callable[..., Any],
    rows: Rows,
    batch: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """``forward(*args, **kwargs)`` of ``module``, an example at a time; tensors of ``batch`` rows are taken apart."""
    places = [
        (owner._parameters, key, parameter)
        for owner in module.modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in rows.offsets
    ]
    slots = {id(parameter): ParameterSlot(rows, parameter) for _, _, parameter in places}
    results = []
    try:
        for index in range(batch):
            leaves = {
                id(parameter): RowLeaf.apply(parameter, index, slots[id(parameter)]) for _, _, parameter in places
            }
            for table, key, parameter in places:
                table[key] = leaves[id(parameter)]
            own = [_row(value, index, batch) for value in args]
            results.append(forward(*own, **{name: _row(value, index, batch) for name, value in kwargs.items()}))
    finally:
        for table, key, parameter in places:
            table[key] = parameter
    return _together(results)


def _row(value: Any, index: int, batch: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
        return value[index : index + 1]
    if isinstance(value, list | tuple):
        return type(value)(_row(part, index, batch) for part in value)
    return value


def _together(results: Sequence[Any]) -> Any:
    first = results[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(results))
    if isinstance(first, list | tuple):
        return type(first)(_together(parts) for parts in zip(*results, strict=True))
    if first is None:
        return None
    raise TypeError(f"a layer gave a {type(first).__name__}")
