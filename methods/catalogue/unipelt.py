"""UniPELT: a prefix, low-rank updates and an adapter in each layer, each behind a gate that looks at the text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of, shape_of
from ..attending import argument, visible
from ..bottleneck import Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..prefixed import Prefix, takes_prefix
from ..registry import Method, meaning_by, register


class UnifiedOptions(BottleneckOptions):
    """Of the adapter; the prefix has ``method.virtual_tokens``, the updates ``method.rank`` and ``method.alpha``."""

    width: int = Field(48, ge=1, description="dimensions of the bottleneck")


class Words:
    """Which positions of a layer's input are words and no padding: (B, L), None for all."""

    real: torch.Tensor | None = None


class Gate(nn.Module):
    """The mean of sigmoid(w . x_i + b) over the words i of a text, (B, 1, 1).

    The mean leaves the padding out, so that a text's gate does not hang on the texts beside it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ask = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        open_by = torch.sigmoid(self.ask(x))
        if real is None:
            return open_by.mean(1, keepdim=True)
        count = real.to(x.dtype)[:, :, None]
        return (open_by * count).sum(1, keepdim=True) / count.sum(1, keepdim=True)


def _words(setting: Setting) -> Any:
    """What the parts of one layer know of its words; ``.layer.N.`` is where the layer's own path ends."""
    return setting.remembered(f"words of {_layer(setting)}", Words)


def _layer(setting: Setting) -> str:
    frames = [path for path, kind in setting.config.places.items() if kind == "layer"]
    return next(path for path in frames if f"{setting.path}.".startswith(f"{path}."))


class WholeLayer(Part):
    """Around a layer: tells the parts within which positions are words."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.words = _words(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = argument(base, args, kwargs, "hidden_states")
        seen = visible(base, argument(base, args, kwargs, "attention_mask"), x.shape[1], x.shape[1])
        self.words.real = None if seen is None else seen.any(2)[:, 0]
        return base(*args, **kwargs)


class GatedPrefix(Part):
    """Keys and values G P_k, G P_v before those of the text."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.words = _words(setting)
        self.prefix = Prefix(base, setting.config.virtual_tokens)
        self.gate = Gate(hidden_width(setting.model))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = argument(base, args, kwargs, "hidden_states")
        return self.prefix.run(base, args, kwargs, self.gate(x, self.words.real))


class GatedUpdate(Part):
    """W0 x + G (alpha / r) B A x."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.words = _words(setting)
        inputs, outputs = shape_of(base)
        self.scaling = setting.config.alpha / setting.config.rank
        self.a = nn.Parameter(torch.empty(setting.config.rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, setting.config.rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.gate = Gate(inputs)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = args[0]
        given: torch.Tensor = base(*args, **kwargs)
        update = F.linear(F.linear(x, self.a), self.b)
        return given + self.gate(x, self.words.real) * self.scaling * update


class GatedAdapter(Part):
    """LN(f + x + G A(LN(f + x))), G of the feed-forward block's input x."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.words = _words(setting)
        self.bottleneck = Bottleneck.of(setting)
        self.gate = Gate(hidden_width(setting.model))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        joins: Any = base
        inner, x = args
        summed = joins.dropout(joins.dense(inner)) + x
        added = self.gate(x, self.words.real) * self.bottleneck(joins.LayerNorm(summed))
        out: torch.Tensor = joins.LayerNorm(summed + added)
        return out


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        attention = layer.attentions[0]
        module: Any = base.model.get_submodule(attention.module)
        if not layer.joins or module.is_causal or not takes_prefix(module):
            raise UserError(
                f"unipelt's gates look at a whole text, in an encoder like BERT; for {type(base.model).__name__}, "
                "choose lora"
            )
        places |= {layer.path: "layer", attention.module: "prefix", layer.joins: "adapter"}
        places |= {attention.query: "update", attention.value: "update"}
    return graft_config("unipelt", places, config, task, base)


register(
    Method(
        name="unipelt",
        summary="a prefix, low-rank updates of query and value, and an adapter in each layer, each behind a gate",
        source="Mao et al. 2022, arXiv 2110.07577",
        equation="prefix G P; W0 x + G (alpha / r) B A x; h + G A(h); G the mean over words i of sigmoid(w . x_i + b)",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 p d + 4 r d + 2 d w and four gates of d + 1 numbers a layer",
        configure=_configure,
        meaning=meaning_by(
            (".gate.", "gate", "nonlinear"),
            (".prefix.", "prefix", "nonlinear"),
            (".bottleneck.", "adapter", "nonlinear"),
            (".a", "update_A", "product"),
            (".b", "update_B", "product"),
        ),
        parts={"layer": WholeLayer, "prefix": GatedPrefix, "update": GatedUpdate, "adapter": GatedAdapter},
        Options=UnifiedOptions,
        uses_rank=True,
        accepts=frozenset({"virtual_tokens"}),
        kind="hybrid",
        merges=False,
        contract={
            "settings": {"options": {"width": 8}},
            "unfit": dict.fromkeys(("gpt2", "llama", "t5", "vit"), "choose lora"),
        },
    )
)
