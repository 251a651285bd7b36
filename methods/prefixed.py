"""Prefixes that any attention with a cache takes: trained keys and values before those of the text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from .anatomy import head_width, shape_of
from .attending import uncached, visible
from .grafts import Part, Setting


class PrefixedCache:
    """In the place of a cache: what it gives has ``keys`` and ``values`` (B, heads, p, width) before it.

    They are never stored; ``cache`` (None for none) goes on without them.
    """

    def __init__(self, cache: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx) if self.cache is not None else 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any) -> tuple[torch.Tensor, ...]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer_idx, *args)
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def takes_prefix(attention: nn.Module) -> bool:
    """Whether a prefix can stand before what ``attention`` looks at."""
    return {"past_key_values", "attention_mask"} <= set(inspect.signature(attention.forward).parameters)


class Prefix(nn.Module):
    """p trained keys and values (p, heads * width) of one attention."""

    def __init__(self, attention: nn.Module, tokens: int) -> None:
        super().__init__()
        projection, parts = _keys_of(attention)
        width = shape_of(projection)[1] // parts
        self.keys = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.values = nn.Parameter(torch.randn(tokens, width) * 0.02)

    def run(
        self, base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], gate: torch.Tensor | None = None
    ) -> Any:
        """``base(*args, **kwargs)`` with the prefix before its keys; ``gate`` (B, 1, 1) multiplies both its halves."""
        args, kwargs = uncached(base, args, kwargs)
        bound = inspect.signature(base.forward).bind(*args, **kwargs)
        attention: Any = base
        x, cache = bound.arguments["hidden_states"], bound.arguments.get("past_key_values")
        past = cache.get_seq_length(attention.layer_idx) if cache is not None else 0
        rows = []
        for half in (self.keys, self.values):
            # A sum with a row of each record's, so that each has a prefix of its own.
            own = x.new_zeros(len(x), *half.shape) + half.to(x.dtype)
            own = own if gate is None else own * gate
            rows.append(own.unflatten(-1, (-1, head_width(attention))).transpose(1, 2))
        bound.arguments["past_key_values"] = PrefixedCache(cache, *rows)
        length = x.shape[1]
        seen = visible(base, bound.arguments.get("attention_mask"), length, past + length)
        if seen is not None:
            before = seen.new_ones(*seen.shape[:-1], len(self.keys))
            mask = torch.cat([before, seen], dim=-1)
            # In numbers, as `eager` adds them; a padding's query may see the prefix alone.
            small = torch.finfo(x.dtype).min
            bound.arguments["attention_mask"] = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, small)
        return base(*bound.args, **bound.kwargs)


class PrefixPart(Part):
    """Around an attention: ``method.virtual_tokens`` keys and values before those of the text."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.prefix = Prefix(base, setting.config.virtual_tokens)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.prefix.run(base, args, kwargs)


def _keys_of(attention: nn.Module) -> tuple[nn.Module, int]:
    """The projection of an attention's keys, and how many equal parts its output has."""
    for name, parts in (("key", 1), ("k_proj", 1), ("c_attn", 3)):
        if isinstance(found := getattr(attention, name, None), nn.Module):
            return found, parts
    raise UserError(f"the keys of {type(attention).__name__} are not known to this method; choose lora")
