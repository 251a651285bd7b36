"""SparseAdapter: bottlenecks of which most numbers are pruned before the training begins."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..bottleneck import ACTIVATIONS, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, meaning_by, register


class SparseOptions(BottleneckOptions):
    """``sparsity``: the part of a matrix that is pruned; ``score``: by what; ``projection_seed``: another draw."""

    width: int = Field(256, ge=1, description="dimensions of the bottleneck")
    sparsity: float = Field(0.75, ge=0, lt=1, description="part of each matrix that is pruned")
    score: Literal["magnitude", "random"] = Field("magnitude", description="what decides which numbers stay")
    projection_seed: int = Field(0, ge=0, description="another drawing of first weights and scores")


class SparseMatrix(nn.Module):
    """A matrix (rows, columns) of which ``values`` at the flat places ``at`` are all that is not zero."""

    def __init__(self, shape: tuple[int, int], at: torch.Tensor, first: torch.Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(first)
        self.register_buffer("at", at, persistent=False)

    def forward(self) -> torch.Tensor:
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        at: Any = self.at
        return flat.index_put((at,), self.values).view(self.shape)


class SparseAdapter(Part):
    """h + U act(D h + b) + c with sparse D and U.

    First weights are drawn alike at every site, and so is what stays of them: the scores that need gradients of records
    (SNIP, GraSP) would tell of those. U is scored by what is drawn for it, and starts at zero.
    """

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options, width = setting.options, hidden_width(setting.model)
        self.down = self._pruned(setting, "down", (options.width, width), options.spread)
        self.up = self._pruned(setting, "up", (width, options.width), 0.0)
        self.down_bias = nn.Parameter(torch.zeros(options.width))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation = ACTIVATIONS[options.activation]

    @staticmethod
    def _pruned(setting: Setting, key: str, shape: tuple[int, int], spread: float) -> SparseMatrix:
        drawn = setting.drawn(*shape, key=key).flatten()
        by_size = setting.options.score == "magnitude"
        score = drawn.abs() if by_size else setting.drawn(*shape, key=f"{key}, score").flatten()
        kept = max(1, round((1 - setting.options.sparsity) * len(score)))
        at = score.argsort(descending=True)[:kept].sort().values
        return SparseMatrix(shape, at, spread * drawn[at])

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        inner = self.activation(F.linear(h.to(self.down_bias.dtype), self.down(), self.down_bias))
        return h + F.linear(inner, self.up(), self.up_bias).to(h.dtype)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        places |= {attention.output: "adapter" for attention in layer.attentions}
        places[layer.down] = "adapter"
    return graft_config("sparse-adapter", places, config, task, base)


register(
    Method(
        name="sparse-adapter",
        summary="houlsby's adapters, wide, with most of their numbers pruned at the start",
        source="He et al. 2022, arXiv 2210.04284",
        equation="h <- h + (M_U o U) act((M_D o D) h + b) + c, masks M fixed at the start; only what they keep exists",
        federates="averaged number by number, masks being equal everywhere; the mean is not the mean of the functions",
        privacy="exact clipping; 2 d w (1 - sparsity) + d + w numbers a place; masks are drawn, so they cost nothing",
        configure=_configure,
        meaning=meaning_by(
            (".down", "adapter", "nonlinear"), (".up_bias", "bias", "nonlinear"), (".up.", "adapter", "nonlinear")
        ),
        parts={"adapter": SparseAdapter},
        Options=SparseOptions,
        kind="hybrid",
        merges=False,
        contract={"settings": {"options": {"width": 16}}},
    )
)
