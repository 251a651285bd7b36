"""AutoPEFT's configurations: serial adapter, parallel adapter and prefix, each of any size, in some of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import Layer, hidden_width, layers_of
from ..bottleneck import Activation, Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..prefixed import Prefix, PrefixPart, takes_prefix
from ..registry import Method, MethodOptions, create_method, meaning_by, register
from .parallel_adapter import BesideBlock, ParallelOptions
from .pfeiffer import StreamAdapter, place_of


class AutoOptions(MethodOptions):
    """The sizes that the search chooses; ``method.layers`` are the layers that have modules at all.

    The defaults are what the paper found on RTE with BERT-base, 12, 96 and 1, scaled to the width of the model.
    """

    serial: int | None = Field(
        None, ge=0, description="width of the serial adapters; 0: none; null: a 64th of the hidden states'"
    )
    parallel: int | None = Field(
        None, ge=0, description="width of the parallel adapters; 0: none; null: an eighth of the hidden states'"
    )
    prefix: int | None = Field(
        None, ge=0, description="keys and values before those of the text; 0: none; null: 1 where the model takes them"
    )
    activation: Activation = Field("relu", description="nonlinearity of the bottlenecks")
    scale: float = Field(4.0, gt=0, description="factor of what the parallel adapter adds")
    spread: float = Field(1e-2, gt=0, description="standard deviation of the first weights of the way down")


def fits_prefix(model: nn.Module) -> bool:
    """Whether every attention of ``model`` takes a prefix."""
    return all(takes_prefix(model.get_submodule(a.module)) for layer in layers_of(model) for a in layer.attentions)


def filled(options: AutoOptions, model: nn.Module) -> AutoOptions:
    """``options`` with a number for each size. Raises :class:`UserError` for a prefix that does not fit."""
    width, fits = hidden_width(model), fits_prefix(model)
    if options.prefix and not fits:
        raise UserError(f"no prefix fits {type(model).__name__}: set method.options.prefix = 0")
    usual = {"serial": max(1, width // 64), "parallel": max(1, width // 8), "prefix": int(fits)}
    return options.model_copy(update={key: size for key, size in usual.items() if getattr(options, key) is None})


def _serial(setting: Setting) -> Setting:
    """The setting of a part that has the serial adapter alone."""
    own = setting.options
    return replace(setting, options=BottleneckOptions(width=own.serial, activation=own.activation, spread=own.spread))


def _parallel(setting: Setting) -> Setting:
    """The setting of a part that has the parallel adapter alone."""
    own = setting.options
    values = {"width": own.parallel, "activation": own.activation, "spread": own.spread, "scale": own.scale}
    return replace(setting, options=ParallelOptions.model_validate(values))


class Join(Part):
    """LN(f + x + S(LN(f + x)) + s P(x)): around the module that adds a block's input x to its output f."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options = setting.options
        self.scale: float = options.scale
        self.serial = Bottleneck.of(_serial(setting)) if options.serial else None
        self.parallel = Bottleneck.of(_parallel(setting)) if options.parallel else None

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        joins: Any = base
        inner, x = args
        summed = total = joins.dropout(joins.dense(inner)) + x
        if self.serial is not None:
            total = total + self.serial(joins.LayerNorm(summed))
        if self.parallel is not None:
            total = total + self.scale * self.parallel(x)
        out: torch.Tensor = joins.LayerNorm(total)
        return out


class SerialStream(StreamAdapter):
    """h + S(h), h what a layer gives, where the layer does not normalise its sums."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, _serial(setting))


class ParallelBlock(BesideBlock):
    """F(x) + s P(x), F the feed-forward block, where a family has it as a module."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, _parallel(setting))


class OwnPrefix(PrefixPart):
    """As many keys and values as the options say."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        Part.__init__(self, base, setting)
        self.prefix = Prefix(base, setting.options.prefix)


def _places(layer: Layer, model: nn.Module, options: AutoOptions) -> dict[str, str]:
    """The places of one layer's modules, and their parts' names."""
    places = {attention.module: "prefix" for attention in layer.attentions if options.prefix}
    if layer.joins and (options.serial or options.parallel):
        return {**places, layer.joins: "join"}
    if options.serial:
        places[place_of(layer, model)[0]] = "serial"
    if options.parallel:
        places[layer.ffn] = "parallel"
    return places


def _chosen(layers: Sequence[Layer], config: MethodConfig) -> list[Layer]:
    known = {layer.index for layer in layers}
    for index in config.layers:
        if index not in known:
            raise UserError(f"method.layers: the model has the layers 0 to {max(known)}, and no {index}")
    return [layer for layer in layers if not config.layers or layer.index in config.layers]


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    options = filled(create_method("autopeft").options_of(config), base.model)
    places: dict[str, str] = {}
    for layer in _chosen(layers_of(base.model), config):
        places |= _places(layer, base.model, options)
    if not places:
        raise UserError("autopeft without any module: set method.options.serial, parallel or prefix above 0")
    made = graft_config("autopeft", places, config, task, base)
    # A part cannot tell what fits the model: others stand around its layers by then.
    made.options = options.model_dump(mode="json")
    return made


register(
    Method(
        name="autopeft",
        summary="serial adapter, parallel adapter and prefix of sizes that `fedgraft methods search` finds",
        source="Zhou et al. 2024, arXiv 2301.12132",
        equation="attention over [P_k; K], [P_v; V], and h <- LN(f + x + S(LN(f + x)) + s P(x)), in method.layers",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 p d + 2 d (w + v) + 2 d + w + v numbers a layer; search it on public records",
        configure=_configure,
        meaning=meaning_by(
            (".prefix.", "prefix", "nonlinear"),
            (".serial.", "adapter", "nonlinear"),
            (".parallel.", "adapter", "nonlinear"),
            (".bottleneck.", "adapter", "nonlinear"),
        ),
        parts={"prefix": OwnPrefix, "join": Join, "serial": SerialStream, "parallel": ParallelBlock},
        Options=AutoOptions,
        accepts=frozenset({"layers"}),
        kind="hybrid",
        merges=False,
        contract={"settings": {"options": {"serial": 6, "parallel": 8}}},
    )
)
