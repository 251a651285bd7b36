"""Pfeiffer's adapter, and AdapterDrop: one bottleneck a layer, on the stream that leaves the feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import Layer, layers_of
from ..attending import first_of, uncached, with_first
from ..bottleneck import Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, create_method, meaning_by, register


class NormalisedAdapter(Part):
    """LN(f + x + A(LN(f + x))): around the module that adds a block's input x to its output f and normalises."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        joins: Any = base
        inner, x = args
        summed = joins.dropout(joins.dense(inner)) + x
        out: torch.Tensor = joins.LayerNorm(summed + self.bottleneck(joins.LayerNorm(summed)))
        return out


class StreamAdapter(Part):
    """h + A(h), h what a layer gives: f + x where the layer does not normalise its sums."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = uncached(base, args, kwargs)  # type: ignore[assignment]
        given = base(*args, **kwargs)
        h = first_of(given)
        return with_first(given, h + self.bottleneck(h))


PARTS: dict[str, type[nn.Module]] = {"normalised": NormalisedAdapter, "stream": StreamAdapter}


def place_of(layer: Layer, model: nn.Module) -> tuple[str, str]:
    """Where the adapter of a layer goes, and the name of its part. Raises :class:`UserError` for other layouts."""
    if layer.joins:
        return layer.joins, "normalised"
    if hasattr(model.get_submodule(layer.path), "output_layer_norm"):
        raise UserError(f"this adapter does not fit the layers of {type(model).__name__}; choose houlsby")
    return layer.path, "stream"


class DropOptions(BottleneckOptions):
    """``skip``: the first layers of each tower that have no adapter."""

    skip: int = Field(5, ge=0, description="first layers without an adapter")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("pfeiffer", dict(place_of(x, base.model) for x in layers_of(base.model)), config, task, base)


def _drop(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    layers = layers_of(base.model)
    skip = create_method("adapterdrop").options_of(config).skip
    kept = [layer for layer in layers if layer.index >= skip]
    if not kept:
        least = max(layer.index for layer in layers)
        raise UserError(f"method.options.skip leaves no layer of the model with an adapter; lower it to {least}")
    return graft_config("adapterdrop", dict(place_of(layer, base.model) for layer in kept), config, task, base)


register(
    Method(
        name="pfeiffer",
        summary="one bottleneck a layer, after the feed-forward block",
        source="Pfeiffer et al. 2021, arXiv 2005.00247; 2020, arXiv 2005.00052",
        equation="h <- LN(f + x + A(LN(f + x))), A(h) = U act(D h + b) + c; else h + A(h), h = f + x",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w + d + w numbers a layer, half of houlsby",
        configure=_configure,
        meaning=meaning_by((".bottleneck.", "adapter", "nonlinear")),
        parts=PARTS,
        Options=BottleneckOptions,
        kind="adapter",
        merges=False,
    )
)
register(
    Method(
        name="adapterdrop",
        summary="pfeiffer's adapters, without the first layers' (fixed, the paper's specialised variant)",
        source="Rueckle et al. 2021, arXiv 2010.11918",
        equation="h <- h + U act(D h + b) + c in the layers from `skip` on; the first are the base's, forward and back",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w + d + w numbers a layer that has an adapter",
        configure=_drop,
        meaning=meaning_by((".bottleneck.", "adapter", "nonlinear")),
        parts=PARTS,
        Options=DropOptions,
        kind="adapter",
        merges=False,
        contract={"settings": {"options": {"skip": 1}}},
    )
)
