"""What a network beside a frozen one reads of it: the states of all layers, taken without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from .anatomy import layers_of
from .attending import argument, first_of, visible


def stack_of(model: nn.Module, method: str, mend: str) -> str:
    """The path of the module that runs a model's one stack of layers. Raises :class:`UserError` for two stacks."""
    layers = layers_of(model)
    if any(layer.stack for layer in layers):
        raise UserError(f"method {method} stands beside one stack of layers, {type(model).__name__} has two: {mend}")
    return layers[0].path.rpartition(".")[0].rpartition(".")[0]


def layers_in(base: nn.Module) -> list[nn.Module]:
    """The layers that the module at :func:`stack_of` runs."""
    lists = [child for child in base.children() if isinstance(child, nn.ModuleList)]
    return max(map(list, lists), key=len)


def run_frozen(
    base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, list[torch.Tensor], torch.Tensor | None]:
    """(what ``base`` gives, the inputs of its first layer and the outputs of all, who may see whom), detached.

    Nothing of ``base`` is kept for a backward pass.
    """
    states: list[torch.Tensor] = []
    seen: list[torch.Tensor | None] = []

    def enter(layer: nn.Module, given: Any, named: Any) -> None:
        states.append(argument(layer, given, named, "hidden_states"))
        attention = next(m for m in layer.modules() if hasattr(m, "is_causal"))
        mask = argument(layer, given, named, "attention_mask")
        seen.append(visible(attention, mask, states[0].shape[1], states[0].shape[1]))

    def leave(layer: nn.Module, given: Any, result: Any) -> None:
        states.append(first_of(result))

    layers = layers_in(base)
    hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.no_grad():
            result = base(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return result, states, seen[0]


def with_last(result: Any, states: torch.Tensor) -> Any:
    """``result`` of a stack with ``states`` as its last hidden states."""
    if isinstance(result, tuple):
        return (states, *result[1:])
    result["last_hidden_state"] = states
    return result
