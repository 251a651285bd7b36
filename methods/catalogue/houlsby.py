"""Sequential adapters: a bottleneck after attention and after the feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import layers_of
from ..bottleneck import Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, meaning_by, register


class SequentialAdapter(Part):
    """h <- h + U act(D h + b) + c on the output of a module, before its residual connection."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        return h + self.bottleneck(h)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        places |= {attention.output: "adapter" for attention in layer.attentions}
        places[layer.down] = "adapter"
    return graft_config("houlsby", places, config, task, base)


register(
    Method(
        name="houlsby",
        summary="bottlenecks after attention and after the feed-forward block",
        source="Houlsby et al. 2019, arXiv 1902.00751",
        equation="h <- h + U act(D h + b) + c, before each residual connection",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w + d + w numbers a place",
        configure=_configure,
        meaning=meaning_by((".bottleneck.", "adapter", "nonlinear")),
        parts={"adapter": SequentialAdapter},
        Options=BottleneckOptions,
        kind="adapter",
        merges=False,
    )
)
