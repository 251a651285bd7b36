"""MOELoRA: low-rank experts, weighted by a gate that knows the task and not the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import dense_weight, is_turned, shape_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, attention_targets, create_method, meaning_by, register


class ExpertOptions(MethodOptions):
    """``experts`` share ``method.rank`` among them."""

    experts: int = Field(8, ge=1, description="experts, of rank method.rank / experts each")
    embedding: int = Field(64, ge=1, description="dimensions of the task's embedding")


class TaskGate(nn.Module):
    """w = softmax(W e), e the embedding of the task: one gate for all layers."""

    def __init__(self, experts: int, size: int) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(size))
        self.weight = nn.Parameter(torch.empty(experts, size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self) -> torch.Tensor:
        return torch.softmax(F.linear(self.task, self.weight), dim=0)


class GatedExperts(Part):
    """W0 x + (alpha / r) sum_i w_i B_i A_i x, with the A_i below one another in A (r, n), the B_i side by side in B."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        rank, inputs_outputs = setting.config.rank, shape_of(base)
        gate: Any = setting.shared("gate", lambda: TaskGate(setting.options.experts, setting.options.embedding))
        self.gate = gate
        self.each = rank // setting.options.experts
        self.scaling = setting.config.alpha / rank
        self.a = nn.Parameter(torch.empty(rank, inputs_outputs[0]))
        self.b = nn.Parameter(torch.zeros(inputs_outputs[1], rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def _weights(self) -> torch.Tensor:
        """The gate's weight of each of the r rows, times the scaling."""
        weights: torch.Tensor = self.gate().repeat_interleave(self.each) * self.scaling
        return weights

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = args[0]
        given: torch.Tensor = base(*args, **kwargs)
        return given + F.linear(F.linear(x.to(self.a.dtype), self.a) * self._weights(), self.b).to(given.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        delta = (self.b * self._weights()) @ self.a
        weight = dense_weight(base)
        return {"weight": weight + (delta.T if is_turned(base) else delta).to(weight.dtype)}


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    experts = create_method("moelora").options_of(config).experts
    if config.rank % experts:
        raise UserError(f"method.rank = {config.rank} cannot be shared among {experts} experts: set it to a multiple")
    targets = tuple(f".{name}" for name in attention_targets(base.model, config))
    places = {path: "experts" for path, _ in base.model.named_modules() if f".{path}".endswith(targets)}
    return graft_config("moelora", places, config, task, base)


register(
    Method(
        name="moelora",
        summary="low-rank experts in each layer, mixed by one gate over the task's embedding",
        source="Liu et al. 2023, arXiv 2310.18339",
        equation="W = W0 + (alpha / r) sum_i w_i B_i A_i over N experts of rank r / N, w = softmax(W_T e)",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; r (m + n) numbers a layer, as LoRA, and the gate's",
        configure=_configure,
        meaning=meaning_by(
            (".gate.", "gate", "nonlinear"), (".a", "expert_A", "product"), (".b", "expert_B", "product")
        ),
        parts={"experts": GatedExperts},
        Options=ExpertOptions,
        uses_rank=True,
        accepts=frozenset({"target_modules"}),
        kind="low-rank",
        contract={"settings": {"options": {"experts": 2, "embedding": 4}}},
    )
)
