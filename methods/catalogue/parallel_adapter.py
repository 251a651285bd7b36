"""Parallel adapters: a scaled bottleneck beside a block instead of after it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import Layer, layers_of
from ..attending import first_of, uncached, with_first
from ..bottleneck import Activation, Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, create_method, meaning_by, register


class ParallelOptions(BottleneckOptions):
    """``scale`` multiplies what the adapter adds; ``beside`` names the block it reads the input of."""

    width: int = Field(512, ge=1, description="dimensions of the bottleneck")
    activation: Activation = Field("relu", description="nonlinearity of the bottleneck")
    scale: float = Field(4.0, gt=0, description="factor of what the adapter adds")
    beside: Literal["ffn", "attention", "both"] = Field("ffn", description="the block that it stands beside")


class BesideBlock(Part):
    """F(x) + s A(x), F a block of the base from its input to before its residual connection."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.scale: float = setting.options.scale
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        args, kwargs = uncached(base, args, kwargs)  # type: ignore[assignment]
        given = base(*args, **kwargs)
        return with_first(given, first_of(given) + self.scale * self.bottleneck(x))


class BesideJoin(Part):
    """The same where one module adds x to the block's output: it gets x + s A(x) instead of x."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.scale: float = setting.options.scale
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner, x = args
        return base(inner, x + self.scale * self.bottleneck(x))


PARTS: dict[str, type[nn.Module]] = {"block": BesideBlock, "join": BesideJoin}


def beside_ffn(layer: Layer) -> dict[str, str]:
    """The place of a parallel adapter of a layer's feed-forward block, and its part's name."""
    return {layer.joins: "join"} if layer.joins else {layer.ffn: "block"}


def beside_attention(layer: Layer) -> dict[str, str]:
    """The places of parallel adapters of a layer's attentions, and their parts' names."""
    return {a.joins or a.module: "join" if a.joins else "block" for a in layer.attentions}


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    beside = create_method("parallel-adapter").options_of(config).beside
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        if beside != "ffn":
            places |= beside_attention(layer)
        if beside != "attention":
            places |= beside_ffn(layer)
    return graft_config("parallel-adapter", places, config, task, base)


register(
    Method(
        name="parallel-adapter",
        summary="a scaled bottleneck beside the feed-forward block, attention or both",
        source="He et al. 2022, arXiv 2110.04366",
        equation="h <- F(x) + s (U act(D x + b) + c), x the input of the block F, before its residual connection",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w + d + w numbers a place",
        configure=_configure,
        meaning=meaning_by((".bottleneck.", "adapter", "nonlinear")),
        parts=PARTS,
        Options=ParallelOptions,
        kind="adapter",
        merges=False,
        contract={"settings": {"options": {"width": 8, "beside": "both"}}},
    )
)
