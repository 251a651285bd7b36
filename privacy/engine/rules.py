"""Where a record meets a trainable: autograd functions that compute what the plain operation does, and give no gradient
to the trainable but a row for each example to its :class:`~.rows.Slot`.

``x`` is always what hangs on the records, its first dimension the batch; the gradient to it is the plain one. Rows are
reduced in the precision of the buffer, whatever the activations are in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from .clippedsum import wide
from .rows import Slot


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, ..., d) as (B, T, d)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def reduced(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``rows`` (B, ...) summed down to what was broadcast from ``shape``: (B, *shape), leading ones left out."""
    if len(shape) == rows.dim():
        shape = shape[1:]
    extra = rows.dim() - 1 - len(shape)
    kind = wide(rows.dtype)
    if extra:
        rows = rows.sum(tuple(range(1, 1 + extra)), dtype=kind)
    spread = [at for at, size in enumerate(shape, 1) if size == 1 and rows.shape[at] != 1]
    return rows.sum(spread, keepdim=True, dtype=kind) if spread else rows


class LinearRows(Function):
    """x W^T + b, with rows for W, b or both."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, for_w: Slot | None, for_b: Slot | None
    ) -> torch.Tensor:
        ctx.for_w, ctx.for_b = for_w, for_b
        ctx.save_for_backward(x if for_w is not None else None, w if ctx.needs_input_grad[0] else None)
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, w = ctx.saved_tensors
        rows = tokens(g)
        if ctx.for_w is not None:
            ctx.for_w.outer(rows, tokens(x))
        if ctx.for_b is not None:
            ctx.for_b.add(rows.sum(1, dtype=wide(rows.dtype)))
        return (g.matmul(w.to(g.dtype)) if w is not None else None), None, None, None, None


class ScaleRows(Function):
    """x * s, s broadcast over the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: torch.Tensor, slot: Slot) -> torch.Tensor:
        ctx.slot, ctx.shape = slot, x.shape
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, s = ctx.saved_tensors
        kind = wide(g.dtype)
        ctx.slot.add(reduced(g.to(kind) * x, tuple(s.shape)))
        return ((g * s).sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None), None, None


class ShiftRows(Function):
    """x + b, b broadcast over the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor, slot: Slot) -> torch.Tensor:
        ctx.slot, ctx.shapes = slot, (x.shape, tuple(b.shape))
        return x + b

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        ctx.slot.add(reduced(g, ctx.shapes[1]))
        return (g.sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[0] else None), None, None


class LayerNormRows(Function):
    """Layer normalisation with rows for its scale, its shift or both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shape: tuple[int, ...],
        w: torch.Tensor | None,
        b: torch.Tensor | None,
        eps: float,
        for_w: Slot | None,
        for_b: Slot | None,
    ) -> torch.Tensor:
        # Autocast has a precision of its own for this operation; an empty batch tells which.
        x = x.to(F.layer_norm(x[:0], shape, w, b, eps).dtype) if torch.is_autocast_enabled(x.device.type) else x
        y, mean, scale = torch.native_layer_norm(x, shape, w, b, eps)
        ctx.for_w, ctx.for_b, ctx.normalised = for_w, for_b, shape
        ctx.save_for_backward(x, mean, scale, w, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g = gradients[0]
        x, mean, scale, w, b = ctx.saved_tensors
        at = g.dim() - len(ctx.normalised)
        if ctx.for_w is not None:
            kind = wide(g.dtype)
            unit = (x.to(kind) - mean) * scale
            ctx.for_w.add(unit.mul_(g).flatten(1, at - 1).sum(1) if at > 1 else unit.mul_(g))
        if ctx.for_b is not None:
            ctx.for_b.add(g.flatten(1, at - 1).sum(1, dtype=wide(g.dtype)) if at > 1 else g)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.ops.aten.native_layer_norm_backward(
                g.to(x.dtype).contiguous(), x, ctx.normalised, mean, scale, w, b, [True, False, False]
            )[0]
        return gx, None, None, None, None, None, None


class EmbeddingRows(Function):
    """Row ``at`` of a table, with rows for the table."""

    @staticmethod
    def forward(ctx: Any, at: torch.Tensor, w: torch.Tensor, padding: int | None, slot: Slot) -> torch.Tensor:
        ctx.slot, ctx.padding = slot, padding
        ctx.save_for_backward(at)
        return F.embedding(at, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        (at,) = ctx.saved_tensors
        if ctx.padding is not None:
            g = torch.where((at == ctx.padding)[..., None], 0.0, g)
        batch = len(at)
        ctx.slot.scatter(at.reshape(batch, -1), g.reshape(batch, -1, g.shape[-1]))
        return None, None, None, None


class ConvolutionRows(Function):
    """A two-dimensional convolution with rows for its kernel, its bias or both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        for_w: Slot | None,
        for_b: Slot | None,
    ) -> torch.Tensor:
        ctx.for_w, ctx.for_b, ctx.how = for_w, for_b, (stride, padding, dilation, groups)
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, b, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        kind = wide(g.dtype)
        if ctx.for_b is not None:
            ctx.for_b.add(g.flatten(2).sum(2, dtype=kind))
        if ctx.for_w is not None:
            patches = F.unfold(x.to(kind), w.shape[2:], dilation, padding, stride)
            per_group = g.to(kind).flatten(2).unflatten(1, (groups, -1))
            ctx.for_w.add(per_group @ patches.unflatten(1, (groups, -1)).transpose(-1, -2))
        gx = None
        if ctx.needs_input_grad[0]:
            how = (None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
            gx = torch.ops.aten.convolution_backward(g, x.to(g.dtype), w.to(g.dtype), *how)[0]
        return gx, None, None, None, None, None, None, None, None


class EinsumRows(Function):
    """An einsum of x and a trainable, in which only x and the result carry the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, labels: tuple[str, str, str], slot: Slot) -> torch.Tensor:
        ctx.slot, ctx.labels = slot, labels
        ctx.save_for_backward(x, w)
        return torch.einsum(f"{labels[0]},{labels[1]}->{labels[2]}", x, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, w = ctx.saved_tensors
        of_x, of_w, of_y = ctx.labels
        kind = wide(g.dtype)
        ctx.slot.add(torch.einsum(f"{of_y},{of_x}->{of_x[0]}{of_w}", g.to(kind), x.to(kind)))
        gx = torch.einsum(f"{of_y},{of_w}->{of_x}", g, w.to(g.dtype)) if ctx.needs_input_grad[0] else None
        return gx, None, None, None


class SpreadRows(Function):
    """What was made once, (1, ...), for each of ``batch`` examples: (batch, ...)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, batch: int, slot: Slot) -> torch.Tensor:
        ctx.slot = slot
        return z.expand(batch, *z.shape[1:]).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.slot.add(gradients[0])
        return None, None, None


class RowLeaf(Function):
    """A trainable as one example sees it."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, index: int, slot: Any) -> torch.Tensor:
        ctx.slot, ctx.index = slot, index
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.slot.row(ctx.index, gradients[0])
        return None, None, None
