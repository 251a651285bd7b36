"""Residual adapters: a LayerNorm of their own and a bottleneck, on what each layer gives."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..attending import first_of, uncached, with_first
from ..bottleneck import Activation, Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, meaning_by, register


class ResidualOptions(BottleneckOptions):
    """Those of a bottleneck; its nonlinearity is the paper's."""

    activation: Activation = Field("relu", description="nonlinearity of the bottleneck")


class ResidualAdapter(Part):
    """h + U act(D LN(h) + b) + c."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.norm = nn.LayerNorm(hidden_width(setting.model))
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = uncached(base, args, kwargs)  # type: ignore[assignment]
        given = base(*args, **kwargs)
        h = first_of(given)
        return with_first(given, h + self.bottleneck(self.norm(h.to(self.norm.weight.dtype))).to(h.dtype))


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {layer.path: "adapter" for layer in layers_of(base.model)}
    return graft_config("residual-adapter", places, config, task, base)


register(
    Method(
        name="residual-adapter",
        summary="a LayerNorm and a bottleneck after each layer",
        source="Lin et al. 2020, arXiv 2004.03829",
        equation="h <- h + U relu(D LN(h) + b) + c, h what a layer gives, LN the adapter's own",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w + 3 d + w numbers a layer",
        configure=_configure,
        meaning=meaning_by((".bottleneck.", "adapter", "nonlinear"), (".norm.", "norm", "nonlinear")),
        parts={"adapter": ResidualAdapter},
        Options=ResidualOptions,
        kind="adapter",
        merges=False,
    )
)
