"""AdaMix: several adapters in one place, of which each step draws one, and the mean of which is what remains."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Batch, Task
from ..anatomy import hidden_width, layers_of
from ..bottleneck import ACTIVATIONS, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, meaning_by, register
from ..steps import Steps


class MixOptions(BottleneckOptions):
    """``experts``: projections to draw from; which of the two are one for all, as the authors' runs have the way up."""

    width: int = Field(16, ge=1, description="dimensions of the bottleneck")
    experts: int = Field(4, ge=1, description="projections that a step draws one of")
    share_down: bool = Field(False, description="one way down for all")
    share_up: bool = Field(True, description="one way up for all")
    consistency: float = Field(1.0, ge=0, description="weight of the two passes' divergence in the loss")


class Drawn(nn.Module):
    """W_i x + b_i of M linear layers: ``chosen`` is i, and None for the mean of all. weight (M, m, n), bias (M, m)."""

    def __init__(self, experts: int, inputs: int, outputs: int, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) * spread)
        self.bias = nn.Parameter(torch.zeros(experts, outputs))
        self.chosen: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.chosen is None:
            return F.linear(x, self.weight.mean(0), self.bias.mean(0))
        return F.linear(x, self.weight[self.chosen], self.bias[self.chosen])


class MixedAdapter(Part):
    """h <- h + U_j act(D_i h + b_i) + c_j on what the feed-forward block gives, before its residual connection."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options, width = setting.options, hidden_width(setting.model)
        self.down = Drawn(1 if options.share_down else options.experts, width, options.width, options.spread)
        self.up = Drawn(1 if options.share_up else options.experts, options.width, width, 0.0)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        inner = self.activation(self.down(h.to(self.down.weight.dtype)))
        return h + self.up(inner).to(h.dtype)


class TwoRoutes(Steps):
    """Each step draws two routes through the adapters, and each record takes both.

    The routes are drawn without a look at any record, and the loss of a record hangs on its own two passes alone, so
    that its gradient can be clipped as any other's.
    """

    def __init__(self, adapter: Any, config: MethodConfig, *, first: int, total: int) -> None:
        super().__init__(adapter, config, first=first, total=total)
        self.consistency = MixOptions.model_validate(dict(config.options)).consistency
        self.drawn = [module for module in adapter.model.modules() if isinstance(module, Drawn)]
        self.routes = self._draw(), self._draw()

    def _draw(self) -> list[int]:
        return [int(torch.randint(len(module.weight), ())) for module in self.drawn]

    def _take(self, route: list[int] | list[None]) -> None:
        for module, chosen in zip(self.drawn, route, strict=True):
            module.chosen = chosen

    def before(self, step: int) -> None:
        self.routes = self._draw(), self._draw()

    def losses(self, task: Task, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the first pass + consistency * (KL(p | q) + KL(q | p)) / 2, p and q what the two predict."""
        if getattr(self.adapter.model, "is_gradient_checkpointing", False):
            # A layer that is run again would find the other route taken.
            raise UserError("method adamix takes two routes: set train.gradient_checkpointing = false")
        try:
            self._take(self.routes[0])
            first = task.predictions(self.adapter.model, batch)
            self._take(self.routes[1])
            second = task.predictions(self.adapter.model, batch)
        finally:
            self.close()
        p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
        right = p.gather(-1, first.targets[..., None])[..., 0]
        apart = ((p.exp() - q.exp()) * (p - q)).sum(-1)
        return ((0.5 * self.consistency * apart - right) * first.shares).sum(1)

    def close(self) -> None:
        self._take([None] * len(self.drawn))


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("adamix", {layer.down: "mixed" for layer in layers_of(base.model)}, config, task, base)


register(
    Method(
        name="adamix",
        summary="adapters of which each step draws one, consistent with one another, and their mean in the end",
        source="Wang et al. 2022, arXiv 2205.12410, section 3",
        equation="h <- h + U act(D_i h + b_i) + c, i drawn at each step; then D = mean D_i; loss CE(p) + sym. KL(p, q)",
        federates="averaged tensor by tensor, each adapter with its own; the mean is not the mean of the functions",
        privacy="exact clipping of both passes together; (M + 1) d w + d + M w numbers a layer, M adapters",
        configure=_configure,
        meaning=meaning_by((".down.", "adapter", "nonlinear"), (".up.", "adapter", "nonlinear")),
        parts={"mixed": MixedAdapter},
        steps=TwoRoutes,
        Options=MixOptions,
        kind="hybrid",
        merges=False,
        recomputes=False,
    )
)
