"""Rows of a matrix too large to be written out for each example: a vocabulary's embedding, a language model's head.

What they are made of is kept instead, until the weights of the rows are known. A norm comes from the Gram matrices of
both factors ("ghost norm": Li et al. 2022, arXiv 2110.05679, section 4), or, for a table, from the sums over equal
tokens; the clipped sum is one product of the weighted factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .clippedsum import wide

#: Trainables of more numbers than this are never written out for each example.
LARGE = 2**20
# Rounding can make the norm of a sum that cancels come out too small; what a dot product may lose is added to it.
_ROUNDING = 16


class KeptMatrix:
    """A slot, and a block, for one large matrix."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._looked_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def written(self) -> bool:
        """Whether this batch has come by."""
        return bool(self._factors or self._looked_up)

    def clear(self) -> None:
        self._factors, self._looked_up = [], []

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._factors.append((a.detach(), b.detach()))

    def scatter(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        self._looked_up.append((at, rows.detach()))

    def add(self, rows: torch.Tensor) -> None:
        raise NotImplementedError

    def squares(self, groups: torch.Tensor | None, count: int) -> torch.Tensor:
        if self._looked_up:
            return self._squares_of_lookups(groups, count)
        a, b = self._joined()
        if groups is None:
            return _gram(a, b)
        squares = a.new_zeros(count)
        for group in range(count):
            own = groups == group
            squares[group] = _gram(a[own].flatten(0, 1)[None], b[own].flatten(0, 1)[None])[0]
        return squares

    def total(self, weights: Sequence[float]) -> torch.Tensor:
        scale = torch.tensor(weights, dtype=wide(self.parameter.dtype), device=self.parameter.device)
        kept = scale != 0
        if self._looked_up:
            table = torch.zeros_like(self.parameter, dtype=wide(self.parameter.dtype))
            for at, rows in self._looked_up:
                scaled = scale[kept, None, None] * rows[kept]
                table.index_add_(0, at[kept].reshape(-1), scaled.reshape(-1, scaled.shape[-1]).to(table.dtype))
            return table.reshape(-1)
        a, b = self._joined()
        a = a[kept] * scale[kept, None, None]
        return (a.flatten(0, 1).t() @ b[kept].flatten(0, 1)).reshape(-1)

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All uses of the matrix as one: its gradient is the sum of theirs."""
        kind = wide(self.parameter.dtype)
        a, b = zip(*self._factors, strict=True)
        return torch.cat(a, 1).to(kind), torch.cat(b, 1).to(kind)

    def _squares_of_lookups(self, groups: torch.Tensor | None, count: int) -> torch.Tensor:
        """Rows of one group and one token are summed, so that no large table is needed: Li et al. 2022, appendix."""
        words, width = self.parameter.shape
        keys, values = [], []
        for at, rows in self._looked_up:
            of_row = torch.arange(len(at), device=at.device) if groups is None else groups
            kept = of_row >= 0
            keys.append((of_row[kept, None] * words + at[kept]).reshape(-1))
            values.append(rows[kept].reshape(-1, width).to(wide(rows.dtype)))
        key, value = torch.cat(keys), torch.cat(values)
        found, where = torch.unique(key, return_inverse=True)
        sums = value.new_zeros(len(found), width).index_add_(0, where, value)
        size = len(self._looked_up[0][0]) if groups is None else count
        return value.new_zeros(size).index_add_(0, found // words, sums.square().sum(1))


def _gram(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|sum_t a_t b_t^T|^2 for each of a batch; a: (B, T, m), b: (B, T, n)."""
    terms = (a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))
    slack = _ROUNDING * torch.finfo(terms.dtype).eps * terms.abs().sum((1, 2))
    return terms.sum((1, 2)).clamp(min=0) + slack
