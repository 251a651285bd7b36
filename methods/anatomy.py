"""The layers of a transformer by what they are for, whatever its family calls them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError


@dataclass(frozen=True)
class Attention:
    """One attention: the paths of its projections; ``module``: what takes hidden states and gives what is attended to.

    ``query``, ``key`` and ``value`` are one path where the model has one projection for all three, in that order.
    """

    module: str
    query: str
    key: str
    value: str
    output: str

    @property
    def fused(self) -> bool:
        return self.query == self.value

    @property
    def joins(self) -> str:
        """The module that takes (what is attended to, the block's input) and adds the input; empty where none does."""
        return "" if self.output.startswith(f"{self.module}.") else self.output.rpartition(".")[0]


@dataclass(frozen=True)
class Layer:
    """One transformer layer. ``attentions``: of itself, and in a decoder that has one, of the encoder's states.

    ``up`` and ``down``: the feed-forward block's first and last linear layer, ``gate`` the one beside the first where
    there is one. ``ffn``: the module that is the whole block, empty where the family has none; there ``joins`` is the
    module that takes (inner activations, the block's input), in this order, and adds the input at the end.
    """

    path: str
    stack: int
    index: int
    attentions: tuple[Attention, ...]
    up: str
    down: str
    gate: str = ""
    ffn: str = ""
    joins: str = ""
    norms: tuple[str, ...] = ()
    attended: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer, each once, in the order of the computation."""
        own = [path for a in self.attentions for path in (a.query, a.key, a.value, a.output)]
        return tuple(dict.fromkeys(path for path in (*own, self.gate, self.up, self.down) if path))


@dataclass(frozen=True)
class _Layout:
    """Relative names within a layer; an attention: (module, query, key, value, output)."""

    attentions: tuple[tuple[str, str, str, str, str], ...]
    up: str
    down: str
    attended: str
    gate: str = ""
    ffn: str = ""
    joins: str = ""


def _within(module: str, *names: str) -> tuple[str, str, str, str, str]:
    query, key, value, output = (f"{module}.{name}" for name in names)
    return module, query, key, value, output


def _t5(attentions: Sequence[str], ffn: str) -> Iterator[_Layout]:
    found = tuple(_within(module, "q", "k", "v", "o") for module in attentions)
    norm = f"{ffn.rpartition('.')[0]}.layer_norm"
    yield _Layout(found, f"{ffn}.wi_1", f"{ffn}.wo", norm, gate=f"{ffn}.wi_0", ffn=ffn)
    yield _Layout(found, f"{ffn}.wi", f"{ffn}.wo", norm, ffn=ffn)


_LAYOUTS = (
    # BERT, RoBERTa, ELECTRA
    _Layout(
        (
            (
                "attention.self",
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ),
        ),
        "intermediate.dense",
        "output.dense",
        "attention.output.LayerNorm",
        joins="output",
    ),
    # Llama, Mistral, Qwen, Gemma
    _Layout(
        (_within("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),),
        "mlp.up_proj",
        "mlp.down_proj",
        "post_attention_layernorm",
        gate="mlp.gate_proj",
        ffn="mlp",
    ),
    # GPT-2
    _Layout((_within("attn", "c_attn", "c_attn", "c_attn", "c_proj"),), "mlp.c_fc", "mlp.c_proj", "ln_2", ffn="mlp"),
    # ViT
    _Layout(
        (_within("attention", "q_proj", "k_proj", "v_proj", "o_proj"),),
        "mlp.fc1",
        "mlp.fc2",
        "layernorm_after",
        ffn="mlp",
    ),
    # DistilBERT
    _Layout(
        (_within("attention", "q_lin", "k_lin", "v_lin", "out_lin"),),
        "ffn.lin1",
        "ffn.lin2",
        "sa_layer_norm",
        ffn="ffn",
    ),
    *_t5(("layer.0.SelfAttention", "layer.1.EncDecAttention"), "layer.2.DenseReluDense"),
    *_t5(("layer.0.SelfAttention",), "layer.1.DenseReluDense"),
)


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """The transformer layers of a base model, in the order in which they are held; ``stack`` counts the towers.

    Raises :class:`UserError` for a family whose layers are not known.
    """
    modules = dict(model.named_modules())
    found: list[Layer] = []
    stacks: dict[str, int] = {}
    for path in modules:
        place = re.fullmatch(r"(.*)\.(\d+)", path)
        layout = _layout_of(path, modules) if place else None
        if place is None or layout is None:
            continue
        stack = stacks.setdefault(place[1], len(stacks))
        attentions = tuple(Attention(*(f"{path}.{name}" for name in names)) for names in layout.attentions)
        paths = {
            key: f"{path}.{name}"
            for key in ("up", "down", "gate", "ffn", "joins", "attended")
            if (name := getattr(layout, key))
        }
        norms = tuple(
            name
            for name, module in modules.items()
            if name.startswith(f"{path}.") and type(module).__name__.endswith("Norm")
        )
        found.append(Layer(path, stack, int(place[2]), attentions, norms=norms, **paths))
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UserError(f"the layers of a {family} model are not known to this method; choose lora")
    return tuple(found)


def _layout_of(path: str, modules: dict[str, nn.Module]) -> _Layout | None:
    for layout in _LAYOUTS:
        names = [name for attention in layout.attentions for name in attention]
        names += [
            name for name in (layout.up, layout.down, layout.gate, layout.ffn, layout.joins, layout.attended) if name
        ]
        if all(f"{path}.{name}" in modules for name in names):
            return layout
    return None


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, whichever way it keeps its weight. Raises :class:`UserError` for others."""
    module: Any = layer
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise UserError(f"{type(module).__name__} is no linear layer")


def is_turned(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (inputs, outputs)."""
    return isinstance(layer, Conv1D)


def dense_weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a linear layer, which must be a plain matrix. Raises :class:`UserError` for a quantised one."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.dim() != 2:
        raise UserError(f"{type(layer).__name__} is quantised or no plain matrix: this method needs its weights")
    return weight


def hidden_width(model: nn.Module) -> int:
    """The width of the hidden states. Raises :class:`UserError` for a configuration that does not say it."""
    config: Any = getattr(model, "config", None)
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    raise UserError(f"{type(model).__name__} does not say how wide its hidden states are")


def head_width(attention: nn.Module) -> int:
    """The dimensions of one head of an attention. Raises :class:`UserError` where it does not say them."""
    for name in ("attention_head_size", "head_dim", "key_value_proj_dim"):
        if isinstance(width := getattr(attention, name, None), int):
            return width
    raise UserError(f"the heads of {type(attention).__name__} are not known to this method; choose lora")
