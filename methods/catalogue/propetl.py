"""ProPETL: one bottleneck, or one low-rank update, for all layers; each uses what its own mask lets through of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import dense_weight, hidden_width, is_turned, layers_of, shape_of
from ..bottleneck import ACTIVATIONS, Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, attention_targets, meaning_by, register


class PrototypeOptions(BottleneckOptions):
    """``keep``: the part of each matrix that a mask lets through."""

    keep: float = Field(0.5, gt=0, le=1, description="part of each matrix that a layer's mask lets through")


class Mask(nn.Module):
    """1 at the places with the largest ``scores``, ``keep`` of all, and 0 elsewhere.

    The gradient goes to the scores as if they were the mask (straight-through).
    """

    def __init__(self, shape: torch.Size, keep: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.empty(shape))
        self.kept = max(1, round(keep * shape.numel()))
        nn.init.kaiming_uniform_(self.scores, a=5**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        flat = self.scores.detach().flatten()
        hard = torch.zeros_like(flat)
        hard[flat.topk(self.kept).indices] = 1.0
        return weight * (hard.view_as(self.scores) + (self.scores - self.scores.detach()))


class MaskedAdapter(Part):
    """h + (m_U o U) act((m_D o D) h + b) + c: D, U, b and c are common to all layers, the masks a layer's own."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options, width = setting.options, hidden_width(setting.model)
        prototype: Any = setting.shared("prototype", lambda: Bottleneck.of(setting))
        self.prototype = prototype
        self.mask_down = Mask(torch.Size((options.width, width)), options.keep)
        self.mask_up = Mask(torch.Size((width, options.width)), options.keep)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        down, up = self.prototype.down, self.prototype.up
        inner = self.activation(F.linear(h.to(down.weight.dtype), self.mask_down(down.weight), down.bias))
        return h + F.linear(inner, self.mask_up(up.weight), up.bias).to(h.dtype)


class Factors(nn.Module):
    """A (r, n) and B (m, r) as LoRA begins with them."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)


class MaskedUpdate(Part):
    """W0 x + (alpha / r) (m_B o B) (m_A o A) x: A and B are common to layers of one name, the masks a layer's own."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        rank, (inputs, outputs) = setting.config.rank, shape_of(base)
        self.scaling = setting.config.alpha / rank
        name = f"{setting.path.rpartition('.')[2]} {outputs} x {inputs}"
        prototype: Any = setting.shared(name, lambda: Factors(inputs, outputs, rank))
        self.prototype = prototype
        self.mask_a = Mask(prototype.a.shape, setting.options.keep)
        self.mask_b = Mask(prototype.b.shape, setting.options.keep)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What this layer's masks let through of A and B."""
        return self.mask_a(self.prototype.a), self.mask_b(self.prototype.b)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        given: torch.Tensor = base(*args, **kwargs)
        a, b = self.factors()
        return given + self.scaling * F.linear(F.linear(args[0].to(a.dtype), a), b).to(given.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        a, b = self.factors()
        weight, delta = dense_weight(base), self.scaling * b @ a
        return {"weight": weight + (delta.T if is_turned(base) else delta).to(weight.dtype)}


class KeepOptions(MethodOptions):
    keep: float = Field(0.5, gt=0, le=1, description="part of each factor that a layer's mask lets through")


def _low_rank(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    targets = tuple(f".{name}" for name in attention_targets(base.model, config))
    places = {path: "update" for path, _ in base.model.named_modules() if f".{path}".endswith(targets)}
    return graft_config("propetl-lora", places, config, task, base)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {layer.down: "adapter" for layer in layers_of(base.model)}
    return graft_config("propetl", places, config, task, base)


register(
    Method(
        name="propetl",
        summary="one bottleneck for all layers, after the feed-forward block, under a binary mask of each layer's own",
        source="Zeng et al. 2023, arXiv 2205.12560",
        equation="h <- h + (m_U o U) act((m_D o D) h + b) + c, m = 1 where its score is among the largest of the layer",
        federates="prototype and scores are averaged, and masks follow from the mean scores",
        privacy="exact clipping through straight-through gradients; 2 d w numbers a layer and once more for all",
        configure=_configure,
        meaning=meaning_by((".prototype.", "adapter", "nonlinear"), (".scores", "mask", "nonlinear")),
        parts={"adapter": MaskedAdapter},
        Options=PrototypeOptions,
        kind="hybrid",
        merges=False,
        contract={"settings": {"options": {"width": 8}}},
    )
)
register(
    Method(
        name="propetl-lora",
        summary="one low-rank update for all layers, under binary masks of each layer's own",
        source="Zeng et al. 2023, arXiv 2205.12560",
        equation="W = W0 + (alpha / r) (m_B o B) (m_A o A), m = 1 where its score is among the largest of the layer",
        federates="prototype and scores are averaged, and masks follow from the mean scores",
        privacy="exact clipping through straight-through gradients; r (m + n) numbers a layer and once more for all",
        configure=_low_rank,
        meaning=meaning_by((".prototype.", "factor", "product"), (".scores", "mask", "nonlinear")),
        parts={"update": MaskedUpdate},
        Options=KeepOptions,
        uses_rank=True,
        accepts=frozenset({"target_modules"}),
        kind="hybrid",
    )
)
