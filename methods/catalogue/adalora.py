"""AdaLoRA: singular triplets beside the weights, of which the budget keeps the strongest over all layers.

The paper scores a triplet by its sensitivity |w g| over the last steps, which differs from site to site; sites would
then prune different triplets, and the mean of their states would be within no budget. Here the score is the paper's
other one, the magnitude of the singular value, of the state from which a round starts: all sites have that state, so
they prune alike, and the mean keeps what is pruned at zero. The budget falls at the start of each round.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..registry import Method, MethodOptions, meaning_by, register
from ..steps import Steps
from ..wrapping import ON_LAYERS, layers_in, on_layers

_ADAPTER = "default"


class AdaLoraOptions(MethodOptions):
    init_r: int = Field(0, ge=0, description="triplets a layer at first; 0: half as many more as method.rank")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the run's steps before anything is pruned")
    final: float = Field(0.3, ge=0, lt=1, description="share of the run's steps at the final budget")
    orth_reg_weight: float = Field(0.1, ge=0, description="weight of |A A^T - 1| + |B^T B - 1| beside the loss")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> AdaLoraConfig:
    options = AdaLoraOptions.model_validate(dict(config.options))
    return on_layers(
        AdaLoraConfig,
        config,
        task,
        base,
        conv1d=True,
        options=False,
        init_r=options.init_r or math.ceil(1.5 * config.rank),
        target_r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        # PEFT's own allocation, which asks for it, never runs.
        total_step=1,
    )


def budget(step: int, total: int, first: int, last: int, options: AdaLoraOptions) -> int:
    """How many triplets step ``step`` of ``total`` keeps, between ``first`` and ``last`` (the paper's equation 12)."""
    start, end = options.warmup * total, (1 - options.final) * total
    if step <= start:
        return first
    if step >= end:
        return last
    return last + int((first - last) * (1 - (step - start) / (end - start)) ** 3)


def scores(layer: Any) -> torch.Tensor:
    """The magnitude of each triplet of a layer, |E_i| |a_i| |b_i|, (r)."""
    a, b, e = (held[_ADAPTER].detach().double() for held in (layer.lora_A, layer.lora_B, layer.lora_E))
    return e[:, 0].abs() * a.norm(dim=1) * b.norm(dim=0)


class Allocation(Steps):
    """Prunes to the budget where a round starts, keeps what is pruned at zero, and keeps A and B near orthonormal."""

    def __init__(self, adapter: Any, config: MethodConfig, *, first: int, total: int) -> None:
        super().__init__(adapter, config, first=first, total=total)
        self.options = AdaLoraOptions.model_validate(dict(config.options))
        self.layers = layers_in(adapter.model, AdaLoraLayer)
        self.kept: list[torch.Tensor] = []

    def before(self, step: int) -> None:
        if step == 0:
            self._prune()

    @torch.no_grad()
    def _prune(self) -> None:
        found = [scores(layer) for layer in self.layers]
        most = sum(len(score) for score in found)
        keep = budget(self.first, self.total, most, self.config.rank * len(found), self.options)
        at = torch.cat(found).argsort(descending=True, stable=True)[:keep]
        kept = torch.zeros(most, dtype=torch.bool)
        kept[at.cpu()] = True
        self.kept = list(kept.split([len(score) for score in found]))
        for layer, mask in zip(self.layers, self.kept, strict=True):
            e = layer.lora_E[_ADAPTER]
            e.mul_(mask[:, None].to(e))

    def gradients(self, step: int) -> None:
        factors = [held[_ADAPTER] for layer in self.layers for held in (layer.lora_A, layer.lora_B)]
        for factor in factors if self.options.orth_reg_weight else ():
            if factor.grad is not None:
                factor.grad += self.options.orth_reg_weight / len(factors) * pull(factor.detach())

    @torch.no_grad()
    def after(self, step: int) -> None:
        # An optimizer with momentum moves what has no gradient, too.
        for layer, mask in zip(self.layers, self.kept, strict=True):
            e = layer.lora_E[_ADAPTER]
            e.mul_(mask[:, None].to(e))


def pull(factor: torch.Tensor) -> torch.Tensor:
    """The gradient of |P P^T - 1|_F for a wide P, or of |P^T P - 1|_F for a tall one."""
    rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
    off = rows @ rows.T - torch.eye(len(rows)).to(rows)
    found = 2 * off @ rows / off.norm().clamp(min=1e-12)
    return found if rows is factor else found.T


register(
    Method(
        name="adalora",
        summary="singular triplets, pruned over all layers to a falling budget",
        source="Zhang et al. 2023, arXiv 2303.10512",
        configure=_configure,
        meaning=meaning_by(
            (".lora_A.", "factor", "product"), (".lora_B.", "factor", "product"), (".lora_E.", "factor", "product")
        ),
        steps=Allocation,
        Options=AdaLoraOptions,
        uses_rank=True,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) B diag(E) A, the rank * layers triplets of largest |E_i| |a_i| |b_i| kept",
        federates="averaged factor by factor; pruned by the state that a round starts from, so alike at every site",
        privacy="exact clipping; 1.5 r (m + n + 1) numbers a layer; pruning asks noised states alone",
    )
)
