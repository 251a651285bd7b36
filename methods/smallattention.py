"""A small attention of an adapter's own."""

from __future__ import annotations

import torch
from torch import nn


class SmallAttention(nn.Module):
    """O [softmax(q_h k_h^T / sqrt(w)) v_h]_h with q, k, v = Q x, K x, V x of ``heads`` heads of ``inner`` dimensions.

    O starts at zero, so that it says nothing at first.
    """

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, heads * inner) for _ in range(3))
        self.output = nn.Linear(heads * inner, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """``seen``: which positions (B or 1, 1, L, L) each may see, None for all."""
        apart = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in apart)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if seen is not None:
            # A padding's query may see nothing: a large number instead of infinity leaves it finite.
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        mixed = torch.softmax(scores, dim=-1) @ v
        out: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out
