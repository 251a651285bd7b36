"""IncreLoRA: rank-one components beside the weights, more of them where the layers have changed most.

The paper scores a layer by the mean of |dW * dL/dW|, smoothed over steps; that differs from site to site, and sites
would grow different layers. Here the score is the mean of dW * dW in the state from which a round starts: from zero on
dW is what the gradients have summed up to, and all sites have that state. The rest is the paper's, but for these:

- Layers grow where a round starts, not every so many steps; how many layers do follows from the budget of that step.
- Tensors keep their shapes in a run, so a layer has a most that it can grow to.
- The reserve (advance learning: vectors that train before they are used, with lambda held at 1e-5) has lambda = 0 in
  what is exchanged: a component is in use if lambda is not 0. Central privacy puts noise on every number, so that all
  seem to be in use; then the strongest stay, as many as the final budget has.
- All layers are scaled by alpha / rank. The authors' code divides by a layer's own rank, and what a layer has learnt
  would shrink as it grows.
- New components have no warm-up of their own: the optimizer starts afresh every round.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, MethodOptions, meaning_by, register
from ..steps import Steps
from ..wrapping import ON_LAYERS, layers_in, on_layers
from .adalora import pull, scores

_ADAPTER = "default"
_ADVANCE = 1e-5


class IncreLoraOptions(MethodOptions):
    init_r: int = Field(1, ge=1, description="components a layer at first")
    grow: int = Field(0, ge=0, description="components that a layer gains at a time; 0: half of method.rank")
    max_r: int = Field(0, ge=0, description="components that a layer can grow to; 0: twice method.rank")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the run's steps before anything grows")
    final: float = Field(0.5, ge=0, lt=1, description="share of the run's steps at the final budget")
    advance_learn: bool = Field(True, description="train what a layer would gain next; under privacy by noise")
    orth_reg_weight: float = Field(0.1, ge=0, description="weight of |A A^T - 1| + |B^T B - 1| beside the loss")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> AdaLoraConfig:
    options = IncreLoraOptions.model_validate(dict(config.options))
    most = options.max_r or 2 * config.rank
    if not options.init_r <= config.rank <= most:
        raise UserError(
            f"method.rank {config.rank} is the mean that layers grow to: set it to {options.init_r} or more "
            f"(method.options.init_r) and {most} at most (max_r)"
        )
    return on_layers(
        AdaLoraConfig,
        config,
        task,
        base,
        conv1d=True,
        options=False,
        init_r=most,
        target_r=config.rank,
        # PEFT divides by init_r.
        lora_alpha=config.alpha * most / config.rank,
        lora_dropout=config.dropout,
        # PEFT's own allocation, which asks for it, never runs.
        total_step=1,
    )


def budget(step: int, total: int, first: int, last: int, options: IncreLoraOptions) -> int:
    """How many components are in use at step ``step`` of ``total``: from ``first`` to ``last``, in even steps."""
    start, end = options.warmup * total, (1 - options.final) * total
    if step >= end:
        return last
    return first if step <= start else first + int((last - first) * (step - start) / (end - start))


def importance(layer: Any) -> float:
    """The mean square of dW = B diag(E) A (m, n), up to the scale that all layers have in common."""
    a, b, e = (held[_ADAPTER].detach().double() for held in (layer.lora_A, layer.lora_B, layer.lora_E))
    a = e * a
    return float(((a @ a.T) * (b.T @ b)).sum()) / (a.shape[1] * b.shape[0])


class Growth(Steps):
    """Grows the most important layers where a round starts, and keeps what is not in use from mattering."""

    def __init__(self, adapter: Any, config: MethodConfig, *, first: int, total: int) -> None:
        super().__init__(adapter, config, first=first, total=total)
        self.options = IncreLoraOptions.model_validate(dict(config.options))
        self.grow = self.options.grow or max(1, config.rank // 2)
        self.layers = layers_in(adapter.model, AdaLoraLayer)
        #: Which components of each layer count, and which of them train: those, and the reserve.
        self.used: list[torch.Tensor] = []
        self.live: list[torch.Tensor] = []

    def before(self, step: int) -> None:
        if step == 0:
            self._allocate()
            self._hold(_ADVANCE)

    def _allocate(self) -> None:
        self.used = [(layer.lora_E[_ADAPTER].detach()[:, 0] != 0).cpu() for layer in self.layers]
        for used in self.used:
            used[: self.options.init_r] = True
        last = self.config.rank * len(self.layers)
        if sum(int(used.sum()) for used in self.used) > last:
            self._keep_strongest(last)
        due = budget(self.first, self.total, self.options.init_r * len(self.layers), last, self.options)
        due -= sum(int(used.sum()) for used in self.used)
        order = sorted(range(len(self.layers)), key=lambda at: -importance(self.layers[at]))
        while due > 0:
            for at in order:
                gained = (~self.used[at]).nonzero()[: min(self.grow, due), 0]
                self.used[at][gained] = True
                due -= len(gained)
        self.live = [used.clone() for used in self.used]
        if self.options.advance_learn:
            for live in self.live:
                live[(~live).nonzero()[: self.grow, 0]] = True

    def _keep_strongest(self, most: int) -> None:
        """Of all layers together."""
        found = [scores(layer).cpu().where(used, -1.0) for layer, used in zip(self.layers, self.used, strict=True)]
        kept = torch.zeros(sum(map(len, found)), dtype=torch.bool)
        kept[torch.cat(found).argsort(descending=True, stable=True)[:most]] = True
        self.used = list(kept.split([len(score) for score in found]))

    @torch.no_grad()
    def _hold(self, reserve: float) -> None:
        """Put lambda of the reserve to ``reserve``, and of what waits behind it to 0."""
        for layer, used, live in zip(self.layers, self.used, self.live, strict=True):
            e = layer.lora_E[_ADAPTER]
            held = torch.where(live, reserve, 0.0)[:, None].to(e)
            e.copy_(torch.where(used[:, None].to(e.device), e, held))

    def gradients(self, step: int) -> None:
        weight = self.options.orth_reg_weight / (2 * len(self.layers))
        for layer, live in zip(self.layers, self.live, strict=True):
            for factor, turned in ((layer.lora_A[_ADAPTER], False), (layer.lora_B[_ADAPTER], True)):
                if factor.grad is None:
                    continue
                rows, gradient = factor.detach(), factor.grad
                if turned:
                    rows, gradient = rows.T, gradient.T
                at = live.to(rows.device)
                gradient[~at] = 0.0
                if weight:
                    gradient[at] += weight * pull(rows[at])

    def after(self, step: int) -> None:
        self._hold(_ADVANCE)

    def close(self) -> None:
        if self.used:
            self._hold(0.0)


register(
    Method(
        name="increlora",
        summary="rank-one components, added where layers change most, up to a budget over all layers",
        source="Zhang et al. 2023, arXiv 2308.12043",
        configure=_configure,
        meaning=meaning_by(
            (".lora_A.", "factor", "product"), (".lora_B.", "factor", "product"), (".lora_E.", "factor", "product")
        ),
        steps=Growth,
        Options=IncreLoraOptions,
        uses_rank=True,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) sum_i lambda_i b_i a_i, rank * layers components in the end, grown by mean dW^2",
        federates="averaged factor by factor; grown by the state that a round starts from, so alike at every site",
        privacy="exact clipping; 2 r (m + n + 1) numbers a layer; growing asks noised states alone",
        # One component a layer learns slowly.
        contract={"lr": 2e-2},
    )
)
