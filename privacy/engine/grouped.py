"""Products in which each site's rows meet that site's own matrix: the same numbers, to the bit, as site by site.

So it is on a CPU with MKL: rows of a product are rounded alike in a batch of several sites and in the site's own
unless that has few of them (BLAS takes another kernel for fewer than four, and divides them among its threads by
eights), and a batched product rounds like its parts unless those are tiny. What is smaller goes site by site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Function

from .clippedsum import wide
from .rows import Slot
from .rules import tokens
from .sites import Pass, Stacks

#: A thread that gets fewer rows of a product may take another kernel.
_FEW = 8
#: Below so many multiplications torch.bmm takes a loop of its own on a CPU.
_TINY = 400


class Into(Protocol):
    """Where the gradient of one trainable goes."""

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take a^T b of each site or row; a: (R, T, m), b: (R, T, n)."""
        ...

    def shift(self, g: torch.Tensor) -> None:
        """Take the sums of ``g`` (R, T, m) for each site or row."""
        ...


class IntoRows:
    """A row for each example."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._slot.outer(a, b)

    def shift(self, g: torch.Tensor) -> None:
        self._slot.add(g.sum(1, dtype=wide(g.dtype)))


class IntoSums:
    """A sum for each site."""

    def __init__(self, stacks: Stacks, parameter: nn.Parameter, current: Callable[[], Pass]) -> None:
        self._gradients = stacks.gradients_of(parameter)
        self._current = current

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        for run in self._current().runs:
            product = each(run.of(a).transpose(1, 2), run.of(b.to(a.dtype)))
            self._gradients[run.at] += product.to(self._gradients.dtype)

    def shift(self, g: torch.Tensor) -> None:
        for run in self._current().runs:
            self._gradients[run.at] += run.of(g).sum(1).to(self._gradients.dtype)


class Turned:
    """Where the gradient of a matrix goes, taken for that of its transpose."""

    def __init__(self, into: Into) -> None:
        self._into = into

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._into.outer(b, a)

    def shift(self, g: torch.Tensor) -> None:
        raise NotImplementedError


def each(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, apart: bool = False) -> torch.Tensor:
    """a[k] b[k] (+ bias[k]) for every k; a: (n, p, q), b: (n, q, r), bias: (n, r). ``apart``: one after another."""
    n, p, q = a.shape
    if n == 1 or apart or (a.device.type == "cpu" and p * q * b.shape[2] < _TINY):
        if bias is None:
            return torch.stack([x.mm(y) for x, y in zip(a, b, strict=True)])
        return torch.stack([torch.addmm(z, x, y) for z, x, y in zip(bias, a, b, strict=True)])
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, b)


def few(rows: int, device: torch.device) -> bool:
    """Whether a site's product with a shared matrix must be taken apart from the others', for so few ``rows``."""
    return device.type == "cpu" and rows < _FEW * torch.get_num_threads()


def in_parts(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, passing: Pass) -> torch.Tensor:
    """``run(x)``, with the rows of each site that has few of them by themselves.

    ``run`` must take each row alone; x: (R, ..., d).
    """
    of_one = x.numel() // (x.shape[-1] * max(1, len(x)))
    if len(passing.parts) == 1 or not few(passing.least * of_one, x.device):
        return run(x)
    results: list[torch.Tensor] = []
    together = None
    for part in passing.parts:
        if few(part.rows * of_one, x.device):
            if together is not None:
                results.append(run(x[together : part.start]))
                together = None
            results.append(run(x[part.start : part.stop]))
        elif together is None:
            together = part.start
    if together is not None:
        results.append(run(x[together:]))
    return torch.cat(results)


class SitesLinear(Function):
    """x M + b with a matrix, a shift or both of each site's own.

    ``right``: the matrix (in, out), or (sites, in, out); ``bias``: (out,), or (sites, out). ``for_m`` takes the
    gradient of M^T, as a linear layer holds its weight. ``anchor`` asks for a gradient where x does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        right: torch.Tensor,
        bias: torch.Tensor | None,
        passing: Pass,
        for_m: Into | None,
        for_b: Into | None,
    ) -> torch.Tensor:
        ctx.passing, ctx.for_m, ctx.for_b = passing, for_m, for_b
        ctx.save_for_backward(x if for_m is not None else None, right if ctx.needs_input_grad[0] else None)
        # A layer adds its bias within the product, unless its input lies scattered in memory.
        within = bias if x.dim() == 2 or x.is_contiguous() else None
        y = _product(x, right, within, passing)
        if bias is not None and within is None:
            y = y + (bias if bias.dim() == 1 else _spread(bias, y, passing))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, right = ctx.saved_tensors
        if ctx.for_m is not None:
            ctx.for_m.outer(tokens(g), tokens(x))
        if ctx.for_b is not None:
            ctx.for_b.shift(tokens(g))
        gx = _product(g, right.transpose(-1, -2).to(g.dtype), None, ctx.passing) if right is not None else None
        return gx, None, None, None, None, None, None


def _product(x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, passing: Pass) -> torch.Tensor:
    shape = (*x.shape[:-1], right.shape[-1])
    if right.dim() == 3:
        return _joined([_of_run(run, x, right, bias) for run in passing.runs]).reshape(shape)
    flat = x.reshape(-1, x.shape[-1])
    if bias is None:
        return in_parts(lambda rows: rows.reshape(-1, rows.shape[-1]).mm(right), x, passing).reshape(shape)
    if bias.dim() == 1:
        return in_parts(lambda rows: torch.addmm(bias, rows.reshape(-1, rows.shape[-1]), right), x, passing).reshape(
            shape
        )
    # Each row with its site's shift, in the one product: added within, it is rounded as a layer rounds it.
    shifts = _spread(bias, flat, passing)
    of_one = len(flat) // passing.batch
    if not few(passing.least * of_one, x.device):
        return torch.addmm(shifts, flat, right).reshape(shape)
    return torch.cat(
        [
            torch.addmm(shifts[at], flat[at], right)
            for at in (slice(part.start * of_one, part.stop * of_one) for part in passing.parts)
        ]
    ).reshape(shape)


def _of_run(run: Any, x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        bias = bias[run.at] if bias.dim() == 2 else bias.expand(len(run.sites), -1)
    rows = run.of(x)
    return each(rows, right[run.at], bias, apart=few(rows.shape[1], x.device)).flatten(0, 1)


def _spread(bias: torch.Tensor, rows: torch.Tensor, passing: Pass) -> torch.Tensor:
    """The shift of its site for each of ``rows``, (..., out)."""
    flat = rows.reshape(-1, rows.shape[-1])
    of_one = len(flat) // passing.batch
    sites = torch.tensor([part.site for part in passing.parts], device=bias.device)
    counts = torch.tensor([part.rows * of_one for part in passing.parts], device=bias.device)
    return bias[sites.repeat_interleave(counts)].reshape(*rows.shape[:-1], -1)


def _joined(results: Sequence[torch.Tensor]) -> torch.Tensor:
    return results[0] if len(results) == 1 else torch.cat(list(results))
