"""Rows of what a layer computes from its trainables alone (an effective weight, a scale), passed on to those.

The layer computes it once for the whole batch. Each example's gradient of it is gathered here, then sent through its
own graph, all examples at a time: the chain rule, with the trainables' part of it shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .clippedsum import wide
from .rows import BufferSlot, ParameterSlot, Rows

#: Above so many numbers a batch, rows are passed on at their last use instead of at the end of the backward pass.
_LARGE = 2**19
#: Numbers that go through a graph together on a processor: large weights' rows, all at once, overflow its caches, and
#: Intrinsic SAID takes twice as long (benchmarks/derived_rows.py).
_AT_ONCE = 2**21
#: A graph from trainables alone has a few dozen nodes; a larger one leads somewhere else.
_NODES = 5000


class ForeignGraphError(Exception):
    """A tensor hangs on something else than trainables."""


class DerivedSlot(BufferSlot):
    """The rows of ``tensor``, which hangs on ``parameters`` and on nothing of the batch."""

    def __init__(self, waiting: Waiting, tensor: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.tensor = tensor
        self.parameters = parameters
        #: What the rules take instead: no plain gradient goes past it.
        self.leaf = tensor.detach().requires_grad_()
        self.uses = self._left = 0
        self.buffer: torch.Tensor | None = None
        self._waiting = waiting

    def used(self) -> None:
        """Count a use in the forward pass."""
        self.uses += 1
        self._left += 1

    def target(self) -> tuple[torch.Tensor, bool]:
        fresh = self.buffer is None
        if self.buffer is None:
            batch = self._waiting.rows.batch
            self.buffer = self.tensor.new_empty((batch, *self.tensor.shape), dtype=wide(self.tensor.dtype))
            self._waiting.slots[id(self)] = self
        return self.buffer, fresh

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().outer(a, b)
        self._wrote()

    def add(self, rows: torch.Tensor) -> None:
        super().add(rows)
        self._wrote()

    def scatter(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        super().scatter(at, rows)
        self._wrote()

    def _wrote(self) -> None:
        self._left -= 1
        if self._left == 0 and self.buffer is not None and self.buffer.numel() > _LARGE:
            self._waiting.pass_on([self])

    def taken(self) -> torch.Tensor:
        """The rows gathered, for the last time: the next one starts anew."""
        buffer, self.buffer, self._left = self.buffer, None, self.uses
        if buffer is None:
            raise RuntimeError("no rows were gathered")
        return buffer.to(self.tensor.dtype)


class Waiting:
    """The derived tensors whose rows are not passed on yet."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.slots: dict[int, DerivedSlot] = {}

    def pass_on(self, slots: Sequence[DerivedSlot] | None = None) -> None:
        """Send the rows of ``slots`` (all that wait, without) through their graphs, to the trainables' own rows."""
        slots = list(self.slots.values()) if slots is None else slots
        if not slots:
            return
        tensors, rows = [slot.tensor for slot in slots], [slot.taken() for slot in slots]
        for slot in slots:
            del self.slots[id(slot)]
        parameters = list({id(p): p for slot in slots for p in slot.parameters}.values())
        places: dict[int, tuple[torch.Tensor, bool]] = {}
        for part in _parts(tensors, len(rows[0])):
            gradients = _gradients(tensors, parameters, [each[part] for each in rows])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if id(parameter) not in places:
                    places[id(parameter)] = ParameterSlot(self.rows, parameter).target()
                target, fresh = places[id(parameter)]
                if fresh:
                    target[part].copy_(gradient)
                else:
                    target[part].add_(gradient)


def _parts(tensors: Sequence[torch.Tensor], batch: int) -> list[slice]:
    """The rows to send through a graph together: on a processor, so many as its caches can hold."""
    if tensors[0].device.type != "cpu":
        return [slice(None)]
    each = max(1, _AT_ONCE // sum(tensor.numel() for tensor in tensors))
    return [slice(at, at + each) for at in range(0, batch, each)]


def _gradients(
    tensors: list[torch.Tensor], parameters: list[nn.Parameter], rows: list[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """The gradient of each row, (B, *parameter.shape); None where a parameter has no part in it."""
    try:
        return torch.autograd.grad(
            tensors, parameters, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, NotImplementedError):
        if len(tensors) > 1:
            # One of many may be what cannot be batched.
            parts = [_gradients([t], parameters, [r]) for t, r in zip(tensors, rows, strict=True)]
            return [_sum(gradients) for gradients in zip(*parts, strict=True)]
    loose = [
        torch.autograd.grad(tensors, parameters, [r[index] for r in rows], retain_graph=True, allow_unused=True)
        for index in range(len(rows[0]))
    ]
    return [None if each[0] is None else torch.stack(each) for each in zip(*loose, strict=True)]


def _sum(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [gradient for gradient in gradients if gradient is not None]
    return sum(given[1:], start=given[0]) if given else None


def trainables_behind(tensor: torch.Tensor, known: dict[int, nn.Parameter], data: set[object]) -> list[nn.Parameter]:
    """The parameters that ``tensor`` hangs on. Raises :class:`ForeignGraphError` when it hangs on anything else.

    ``data``: the graph nodes at which the records come in.
    """
    found: dict[int, nn.Parameter] = {}
    seen: set[object] = set()
    left = [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in data or len(seen) > _NODES:
            raise ForeignGraphError
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in known:
                raise ForeignGraphError
            found[id(variable)] = known[id(variable)]
        left.extend(function for function, _ in node.next_functions)
    return list(found.values())
