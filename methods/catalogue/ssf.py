"""SSF and the Hadamard adapter: what frozen modules compute, scaled and shifted dimension by dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import is_turned, layers_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register


class ScaleShift(Part):
    """y <- scale * y + shift on the last dimension of what a linear or normalisation layer gives."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        weight: Any = base.weight
        width = weight.shape[1 if is_turned(base) else 0]
        spread = getattr(setting.options, "spread", 0.0)
        self.scale = nn.Parameter(1.0 + spread * torch.randn(width))
        self.shift = nn.Parameter(spread * torch.randn(width))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(*args, **kwargs)
        return (y * self.scale + self.shift).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        weight: Any = base.weight
        bias: Any = getattr(base, "bias", None)
        if bias is None:
            raise ValueError(f"a {type(base).__name__} has no bias to take the shift")
        turned = weight.dim() == 1 or is_turned(base)
        scale = self.scale if turned else self.scale[:, None]
        return {"weight": weight * scale, "bias": bias * self.scale + self.shift}


class SsfOptions(MethodOptions):
    """``spread``: standard deviation of the first scales around 1 and of the first shifts around 0."""

    spread: float = Field(0.02, ge=0, description="standard deviation of first scales (around 1) and shifts")


def _ssf(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {path: "affine" for layer in layers_of(base.model) for path in (*layer.linears, *layer.norms)}
    return graft_config("ssf", places, config, task, base)


def _hadamard(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        places |= {attention.output: "affine" for attention in layer.attentions}
        places[layer.attended] = "affine"
    return graft_config("hadamard", places, config, task, base)


_MEANING = meaning_by((".scale", "scale", "linear"), (".shift", "shift", "linear"))

register(
    Method(
        name="ssf",
        summary="a scale and a shift after every linear and normalisation layer",
        source="Lian et al. 2022, arXiv 2210.08823",
        equation="y <- gamma * y + beta, dimension by dimension",
        federates="averages exactly within a layer",
        privacy="exact clipping; 2 d_out numbers a linear or normalisation layer",
        configure=_ssf,
        meaning=_MEANING,
        parts={"affine": ScaleShift},
        Options=SsfOptions,
        kind="other additive",
        # Attention does not see a constant that is added to every key, as softmax is blind to it.
        contract={"inert": tuple(f".{key}.graft.default.shift" for key in ("key", "k_proj", "k"))},
    )
)
register(
    Method(
        name="hadamard",
        summary="a scale and a shift after attention, and those of the LayerNorm behind it",
        source="Chen et al. 2023, arXiv 2407.11033",
        equation="A' = w * A + b on the attention's output; scale and shift of the next LayerNorm",
        federates="averages exactly within a layer",
        privacy="exact clipping; 4 d numbers a layer",
        configure=_hadamard,
        meaning=_MEANING,
        parts={"affine": ScaleShift},
        kind="adapter",
    )
)
