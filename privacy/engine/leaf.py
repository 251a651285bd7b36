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
) -> list[Any]:
    """What ``forward(*args, **kwargs)`` of ``module`` gives for each example; tensors of ``batch`` rows are parted."""
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
    return results


def _row(value: Any, index: int, batch: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
        return value[index : index + 1]
    if isinstance(value, list | tuple):
        return type(value)(_row(part, index, batch) for part in value)
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of what a layer gave, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    if value is None:
        return []
    raise TypeError(f"it gives a {type(value).__name__}")


def batch_dimensions(single: Any, whole: Any) -> list[int]:
    """In which dimension each tensor of ``whole`` holds its examples, ``single`` being what one of them gives."""
    found = []
    for one, every in zip(tensors(single), tensors(whole), strict=True):
        differ = [at for at, (a, b) in enumerate(zip(one.shape, every.shape, strict=True)) if a != b]
        if len(differ) > 1 or any(one.shape[at] != 1 for at in differ):
            raise ValueError(f"one gives {list(one.shape)}, all give {list(every.shape)}")
        found.append(differ[0] if differ else 0)
    return found


def joined(results: Sequence[Any], dimensions: Sequence[int]) -> Any:
    """The results of all examples as one, each tensor along its own dimension."""
    left = iter(dimensions)

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(list(parts), next(left))
        if isinstance(parts[0], list | tuple):
            return type(parts[0])(join(each) for each in zip(*parts, strict=True))
        return parts[0]

    return join(results)
