"""LoRA, rsLoRA and DoRA: dW = scaling * B A beside a frozen linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..bases import bases_of
from ..registry import Method, attention_targets, register


def lora_config(config: MethodConfig, task: Task, base: BaseModel, **options: object) -> LoraConfig:
    return LoraConfig(
        task_type=task.peft_type or None,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=attention_targets(base.model, config),
        layers_to_transform=list(config.layers) or None,
        modules_to_save=list(base.head) or None,
        **options,  # type: ignore[arg-type]
    )


#: What a LoRA configuration makes use of, besides rank and alpha.
LORA_ACCEPTS = frozenset({"target_modules", "layers", "dropout"})


def set_basis(model: PeftModel, config: MethodConfig) -> None:
    """Rows of A from ``method.init``, as long (root mean square) as those that were drawn; W0 and B stay as they are.

    With ``svd`` they are the right singular vectors of W0 with the largest singular values.
    """
    if not config.init:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for factor in layer.lora_A.values():
                a: Any = factor.weight
                _, rows = bases_of(layer, name.removeprefix("base_model.model."), len(a), config.init)
                with torch.no_grad():
                    a.copy_(rows.to(a.device) * a.double().square().sum(1).mean().sqrt())


def lora_meaning(name: str) -> tuple[str, Averaging]:
    for role in ("lora_A", "lora_B"):
        if f".{role}." in name:
            return role, "product"
    if "lora_magnitude_vector" in name:
        return "magnitude", "nonlinear"
    return "head", "nonlinear"


register(
    Method(
        name="lora",
        summary="dW = (alpha / r) B A",
        source="Hu et al. 2021, arXiv 2106.09685",
        configure=lora_config,
        meaning=lora_meaning,
        uses_rank=True,
        build=set_basis,
        accepts=LORA_ACCEPTS | {"init"},
        equation="W = W0 + (alpha / r) B A, B (m, r) and A (r, n)",
        federates=(
            "averaged factor by factor (FedIT), which is not the mean of the products: exact strategies mend it"
        ),
        privacy="exact clipping; r (m + n) numbers a layer, and noise on both factors multiplies",
    )
)
register(
    Method(
        name="rslora",
        summary="dW = (alpha / sqrt(r)) B A, stable at large ranks",
        source="Kalajdzievski 2023, arXiv 2312.03732",
        configure=lambda config, task, base: lora_config(config, task, base, use_rslora=True),
        meaning=lora_meaning,
        uses_rank=True,
        build=set_basis,
        accepts=LORA_ACCEPTS | {"init"},
        options={"scaling": "sqrt"},
        equation="W = W0 + (alpha / sqrt(r)) B A",
        federates=(
            "averaged factor by factor (FedIT), which is not the mean of the products: exact strategies mend it"
        ),
        privacy="exact clipping; r (m + n) numbers a layer, and noise on both factors multiplies",
    )
)
register(
    Method(
        name="dora",
        summary="W + dW with its column norms trained apart (magnitude and direction)",
        source="Liu et al. 2024, arXiv 2402.09353",
        configure=lambda config, task, base: lora_config(config, task, base, use_dora=True),
        meaning=lora_meaning,
        uses_rank=True,
        accepts=LORA_ACCEPTS,
        equation="W = m (W0 + s B A) / |W0 + s B A|, row by row",
        federates="averaged tensor by tensor; neither direction nor magnitude averages exactly",
        privacy="exact clipping; r (m + n) + m numbers a layer",
    )
)
