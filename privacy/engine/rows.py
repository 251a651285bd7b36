"""Where the rows go: one flat buffer with a gradient over all trainables for each example of a batch.

A rule of :mod:`.rules` knows one :class:`Slot`: the place of one tensor's rows. It adds to it and returns no gradient
of its own, so that nothing unclipped ever reaches a parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from .clippedsum import wide


class Slot(Protocol):
    """The place of the rows of one tensor, here called ``w``."""

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add sum_t a[:, t, i] * b[:, t, j] to row entries [i, j] of a matrix ``w``; a: (B, T, m), b: (B, T, n)."""
        ...

    def add(self, rows: torch.Tensor) -> None:
        """Add ``rows``, shape (B, *w.shape) or anything of as many entries in that order."""
        ...

    def scatter(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows[b, t] to row entries [at[b, t]] of a matrix ``w``; at: (B, T), rows: (B, T, n)."""
        ...


class Rows:
    """The flat buffer G (B, P), float32 or wider, which one batch after another is written into."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.known = {id(parameter): parameter for parameter in self.parameters}
        self.offsets: dict[int, int] = {}
        self.size = 0
        for parameter in self.parameters:
            self.offsets[id(parameter)] = self.size
            self.size += parameter.numel()
        self.batch = 0
        #: Another number whenever the rows lie elsewhere or are more or fewer.
        self.place = 0
        self._buffer: torch.Tensor | None = None
        self._written: set[int] = set()

    def begin(self, batch: int) -> None:
        """Make room for ``batch`` rows and forget the last ones."""
        self._written.clear()
        if batch != self.batch or self._buffer is None:
            self.place += 1
        self.batch = batch
        if self._buffer is None or len(self._buffer) < batch:
            first = self.parameters[0]
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = torch.empty(batch, self.size, dtype=wide(first.dtype), device=first.device)

    def lie_in(self, matrix: torch.Tensor) -> None:
        """Forget the last rows; the next ones are written into ``matrix`` (B, P)."""
        self._written.clear()
        self.place += 1
        self.batch, self._buffer = len(matrix), matrix

    def free(self) -> None:
        """Give the memory back."""
        self._buffer = None

    @property
    def matrix(self) -> torch.Tensor:
        """The rows so far, (B, P)."""
        if self._buffer is None:
            raise RuntimeError("a backward pass outside of the engine's own")
        return self._buffer[: self.batch]

    def missing(self) -> list[nn.Parameter]:
        """The parameters that nothing was written for in this batch."""
        return [parameter for parameter in self.parameters if id(parameter) not in self._written]

    def part(self, parameter: nn.Parameter) -> torch.Tensor:
        """The rows of one parameter, (B, its size)."""
        at = self.offsets[id(parameter)]
        return self.matrix[:, at : at + parameter.numel()]

    def fresh(self, parameter: nn.Parameter) -> bool:
        """Whether nothing was written for ``parameter`` yet; from now on something was."""
        known = id(parameter) in self._written
        self._written.add(id(parameter))
        return not known


class BufferSlot(ABC):
    """A slot whose rows lie in memory, (B, *w.shape)."""

    @abstractmethod
    def target(self) -> tuple[torch.Tensor, bool]:
        """The rows, and whether they hold nothing yet but what was left there."""

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        target, fresh = self.target()
        a, b = a.to(target.dtype).transpose(1, 2), b.to(target.dtype)
        if fresh and target.is_contiguous():
            torch.bmm(a, b, out=target)
            return
        # Into memory of its own first: straight into rows that lie apart, each would be a product by itself.
        product = torch.bmm(a, b)
        if fresh:
            target.copy_(product)
        else:
            target.add_(product)

    def add(self, rows: torch.Tensor) -> None:
        target, fresh = self.target()
        rows = rows.reshape(target.shape)
        if fresh:
            target.copy_(rows)
        else:
            target.add_(rows)

    def scatter(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        target, fresh = self.target()
        if fresh:
            target.zero_()
        where = torch.arange(len(at), device=at.device)[:, None].expand_as(at)
        target.index_put_((where, at), rows.to(target.dtype), accumulate=True)

    def row(self, index: int, gradient: torch.Tensor) -> None:
        """Add one example's gradient to its row."""
        target, fresh = self.target()
        if fresh:
            target.zero_()
        target[index].add_(gradient.reshape(target.shape[1:]))


class ParameterSlot(BufferSlot):
    """The rows of a parameter, or of a view of one that is contiguous: straight in the flat buffer."""

    def __init__(self, rows: Rows, parameter: nn.Parameter, view: torch.Tensor | None = None) -> None:
        self._rows = rows
        self._parameter = parameter
        self._offset, self._shape, self._whole = rows.offsets[id(parameter)], tuple(parameter.shape), True
        # The rows lie in order, whatever the parameter's own memory looks like.
        self._strides = tuple(math.prod(self._shape[at + 1 :]) for at in range(len(self._shape)))
        if view is not None:
            self._offset += int(view.storage_offset() - parameter.storage_offset())
            self._shape, self._strides = tuple(view.shape), view.stride()
            self._whole = view.numel() == parameter.numel()
        self._place, self._target = -1, parameter.detach()

    def target(self) -> tuple[torch.Tensor, bool]:
        rows = self._rows
        fresh = rows.fresh(self._parameter)
        if fresh and not self._whole:
            rows.part(self._parameter).zero_()
            fresh = False
        if self._place != rows.place:
            matrix = rows.matrix
            at = matrix.storage_offset() + self._offset
            self._target = matrix.as_strided((rows.batch, *self._shape), (matrix.stride(0), *self._strides), at)
            self._place = rows.place
        return self._target, fresh


class Turned:
    """The slot of a matrix, taken for the slot of its transpose."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._slot.outer(b, a)

    def add(self, rows: torch.Tensor) -> None:
        raise NotImplementedError

    def scatter(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        raise NotImplementedError


def turned(w: torch.Tensor) -> torch.Tensor:
    """The transpose of a matrix; it asks for a gradient where ``w`` does, and passes none on."""
    return w.detach().t().requires_grad_(w.requires_grad)
