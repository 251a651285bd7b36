"""DyLoRA and Delta-LoRA: LoRA's factors, trained otherwise."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..registry import Method, MethodOptions, register
from ..steps import Steps
from .lora import LORA_ACCEPTS, lora_config, lora_meaning

_ADAPTER = "default"


class DyloraOptions(MethodOptions):
    """``least``: the smallest rank that is trained for; ``frozen``: only row and column b follow the gradient."""

    least: int = Field(1, ge=1, description="the smallest rank that the adapter shall be good at")
    frozen: bool = Field(False, description="train row and column b alone, not all up to b")


class NestedSteps(Steps):
    """Each step draws a rank b and trains what the adapter is at that rank: the first b rows of A, columns of B.

    The factors beyond b get no gradient of the data; under privacy what they hold is noise, and does not move them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = [module for module in self.adapter.model.modules() if isinstance(module, LoraLayer)]
        self._factors: list[tuple[Any, Any]] = [(x.lora_A[_ADAPTER], x.lora_B[_ADAPTER]) for x in layers]
        self._options = DyloraOptions.model_validate(dict(self.config.options))
        self._rank = self.config.rank
        self._hooks = [a.register_forward_hook(self._cut) for a, _ in self._factors]

    def _cut(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(output.shape[-1], device=output.device) < self._rank
        return output * kept.to(output.dtype)

    def before(self, step: int) -> None:
        least = min(self._options.least, self.config.rank)
        self._rank = int(torch.randint(least, self.config.rank + 1, ()))

    def gradients(self, step: int) -> None:
        first = self._rank - 1 if self._options.frozen else 0
        for a, b in self._factors:
            for weight, rows in ((a.weight, 0), (b.weight, 1)):
                if weight.grad is not None:
                    kept = torch.zeros(weight.shape[rows], dtype=torch.bool, device=weight.device)
                    kept[first : self._rank] = True
                    weight.grad = weight.grad * (kept[:, None] if rows == 0 else kept)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class DeltaOptions(MethodOptions):
    """``share``: lambda, how much of each change of B A goes into the base weights as well."""

    share: float = Field(0.5, gt=0, description="lambda: how much of each change of B A moves the base weights too")


class DeltaSteps(Steps):
    """The gradient that the factors have where the base weights' part does not count.

    W_t+1 = W_t + lambda s (B A_t+1 - B A_t) telescopes, so that W0 + lambda s B A is what the base weights are at any
    time, also after an average of factors; the adapter then computes with (1 + lambda) s B A, whose gradient is
    1 + lambda times the factors' own.
    """

    def gradients(self, step: int) -> None:
        share = DeltaOptions.model_validate(dict(self.config.options)).share
        for tensor in self.adapter.spec.tensors:
            parameter = self.adapter.trainables().get(tensor.name)
            if tensor.role != "head" and parameter is not None and parameter.grad is not None:
                parameter.grad = parameter.grad / (1 + share)


def _delta(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    share = DeltaOptions.model_validate(dict(config.options)).share
    return lora_config(config.model_copy(update={"alpha": config.alpha * (1 + share)}), task, base)


_FEDERATES = "averaged factor by factor (FedIT), which is not the mean of the products: exact strategies mend it"

register(
    Method(
        name="dylora",
        summary="LoRA that is good at every rank up to method.rank: cut it afterwards as needed",
        source="Valipour et al. 2023, arXiv 2210.07558",
        equation="W = W0 + (alpha / r) B[:, :b] A[:b], b drawn from 1..r at each step",
        federates=_FEDERATES,
        privacy="exact clipping; noise on what a step does not train is thrown away",
        configure=lora_config,
        meaning=lora_meaning,
        steps=NestedSteps,
        uses_rank=True,
        accepts=LORA_ACCEPTS,
        Options=DyloraOptions,
    )
)
register(
    Method(
        name="delta-lora",
        summary="LoRA whose changes move the base weights too, lambda times",
        source="Zi et al. 2023, arXiv 2309.02411",
        equation="W_t+1 = W_t + lambda s (B A_t+1 - B A_t), beside s B A; together W0 + (1 + lambda) s B A",
        federates=_FEDERATES,
        privacy="exact clipping; r (m + n) numbers a layer, the base weights' part is post-processing",
        configure=_delta,
        meaning=lora_meaning,
        steps=DeltaSteps,
        uses_rank=True,
        accepts=LORA_ACCEPTS,
        Options=DeltaOptions,
    )
)
