"""Masks of weights: which weights of the base stay (threshold mask), and which change (diff pruning)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import layers_of
from ..dense import WeightChange
from ..grafts import GraftConfig, Setting, graft_config
from ..registry import Method, MethodOptions, attention_targets, meaning_by, register
from ..steps import Steps


class MaskOptions(MethodOptions):
    """``threshold``: a score above it keeps its weight; ``start``: the first scores."""

    threshold: float = Field(0.01, description="a weight stays where its score is above this")
    start: float = Field(0.02, description="first score of every weight; above the threshold, so that all stay")


class KeptWeights(WeightChange):
    """W0 * 1[score > tau]: the gradient of the mask passes to the scores as if it were the scores themselves."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.threshold = setting.options.threshold
        self.scores = nn.Parameter(torch.full((self.outputs, self.inputs), setting.options.start))

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        hard = (self.scores > self.threshold).to(self.scores.dtype)
        mask = self.scores + (hard - self.scores).detach()
        return weight * (mask - 1)


class DiffOptions(MethodOptions):
    """``low`` and ``high``: how far the hard-concrete distribution is stretched; ``temperature``: how soft it is.

    ``penalty``: weight of the expected number of changed weights in the loss.
    """

    low: float = Field(-1.5, lt=0, description="left end of the stretched hard-concrete distribution")
    high: float = Field(1.5, gt=1, description="its right end")
    temperature: float = Field(1.0, gt=0, description="its temperature")
    penalty: float = Field(1.25e-7, ge=0, description="weight of the expected number of changed weights in the loss")
    start: float = Field(0.5, description="first log-odds of a change")


class PrunedDifference(WeightChange):
    """dW = z * w with z = clip(s (high - low) + low, 0, 1), s = sigmoid((noise + a) / temperature).

    ``noise`` is the logistic noise of a training's step, and 0 outside of one.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.options = setting.options
        self.difference = nn.Parameter(torch.zeros(self.outputs, self.inputs))
        self.odds = nn.Parameter(torch.full((self.outputs, self.inputs), setting.options.start))
        self.noise: torch.Tensor | None = None

    def gates(self) -> torch.Tensor:
        odds = self.odds if self.noise is None else self.odds + self.noise
        low, high = self.options.low, self.options.high
        return torch.clamp(torch.sigmoid(odds / self.options.temperature) * (high - low) + low, 0, 1)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        return self.gates() * self.difference

    def penalty_gradient(self) -> torch.Tensor:
        """Of the expected number of changed weights, sum sigmoid(a - t log(-low / high)), with respect to a."""
        chance = torch.sigmoid(self.odds - self.options.temperature * math.log(-self.options.low / self.options.high))
        return chance * (1 - chance)


class DiffSteps(Steps):
    """Draws the gates of a step, and adds the penalty's gradient, which no record has a part in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts = [module for module in self.adapter.model.modules() if isinstance(module, PrunedDifference)]

    def before(self, step: int) -> None:
        for part in self._parts:
            uniform = torch.rand_like(part.odds).clamp(1e-6, 1 - 1e-6)
            part.noise = torch.log(uniform) - torch.log1p(-uniform)

    def gradients(self, step: int) -> None:
        for part in self._parts:
            if part.odds.grad is not None:
                part.odds.grad = part.odds.grad + part.options.penalty * part.penalty_gradient().detach()

    def close(self) -> None:
        for part in self._parts:
            part.noise = None


def places_of(config: MethodConfig, base: BaseModel) -> dict[str, str]:
    """The layers asked for in ``method.target_modules``, or else every linear layer of the transformer's."""
    if config.target_modules:
        targets = tuple(f".{name}" for name in attention_targets(base.model, config))
        return {name: "change" for name, _ in base.model.named_modules() if f".{name}".endswith(targets)}
    return {path: "change" for layer in layers_of(base.model) for path in layer.linears}


def _threshold(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("threshold-mask", places_of(config, base), config, task, base)


def _difference(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("diff-pruning", places_of(config, base), config, task, base)


register(
    Method(
        name="threshold-mask",
        summary="which weights of the base stay: a trained score for each, cut at a threshold",
        source="Zhao et al. 2020, arXiv 2004.12406",
        equation="W = W0 * 1[S > tau], dS = dL/d(mask) (straight through)",
        federates="scores are averaged and cut anew; the mask of the mean is not the mean of the masks",
        privacy="exact clipping, but noise on a score for every weight",
        configure=_threshold,
        meaning=meaning_by((".scores", "score", "nonlinear")),
        parts={"change": KeptWeights},
        accepts=frozenset({"target_modules"}),
        Options=MaskOptions,
        kind="partial",
    )
)
register(
    Method(
        name="diff-pruning",
        summary="a difference of the weights, most of it gated to zero",
        source="Guo et al. 2021, arXiv 2012.07463",
        equation="W = W0 + z * w, z hard-concrete gates with an L0 penalty",
        federates="gates and differences are averaged apart; the mean of the products is another",
        privacy="exact clipping, but noise on two numbers for every weight; the penalty sees no record",
        configure=_difference,
        meaning=meaning_by((".difference", "weight", "product"), (".odds", "gate", "nonlinear")),
        parts={"change": PrunedDifference},
        steps=DiffSteps,
        accepts=frozenset({"target_modules"}),
        Options=DiffOptions,
        kind="partial",
    )
)
