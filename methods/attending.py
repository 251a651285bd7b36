"""What parts around a whole attention or layer have to know of it: who may see whom, and its cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError


def first_of(given: Any) -> torch.Tensor:
    """The hidden states of what a module gives: itself, or the first of a tuple."""
    states: torch.Tensor = given[0] if isinstance(given, tuple) else given
    return states


def with_first(given: Any, states: torch.Tensor) -> Any:
    """``given`` with ``states`` in the place of its hidden states."""
    return (states, *given[1:]) if isinstance(given, tuple) else states


def uncached(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the layer ``base``, without a cache that holds nothing of it, where gradients are taken.

    A layer may be run more than once on the same records there, and each run would fill the cache.
    """
    if not torch.is_grad_enabled():
        return list(args), dict(kwargs)
    index = next((m.layer_idx for m in base.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    across = kwargs.get("key_value_states") is not None

    def kept(value: Any) -> Any:
        cache = getattr(value, "cross_attention_cache", value) if across else value
        length = getattr(cache, "get_seq_length", None)
        return None if length is not None and not length(index) else value

    return [kept(value) for value in args], {key: kept(value) for key, value in kwargs.items()}


def argument(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> Any:
    """What ``base`` was given by the first of ``names`` that it takes, by its place or by its name; else None."""
    taken = inspect.signature(base.forward).bind_partial(*args, **kwargs).arguments
    taken = {**taken.pop("kwargs", {}), **taken}
    return next((taken[name] for name in names if taken.get(name) is not None), None)


def require_whole(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], method: str) -> None:
    """Raise :class:`UserError` where a cache holds a part of the text, whose hidden states are gone."""
    cache = argument(base, args, kwargs, "past_key_values")
    index = next((m.layer_idx for m in base.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    if cache is not None and cache.get_seq_length(index):
        raise UserError(f"method {method} needs the whole text at each step: set use_cache = False to generate")


def visible(module: nn.Module, mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
    """Which keys each query may see, as a boolean (B or 1, 1, queries, keys); None where it may see all.

    ``mask`` is what the attention ``module`` was given: boolean, or to be added to the scores. Raises
    :class:`UserError` for the masks of other kinds of attention.
    """
    if mask is None:
        if not getattr(module, "is_causal", False) or queries == 1:
            return None
        device = next(module.parameters()).device
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
    if mask.dim() != 4:
        raise UserError("this method needs the attention masks of `sdpa` or `eager`: choose lora")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[..., :keys]
