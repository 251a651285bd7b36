"""LayerNorm tuning: train the scale and shift of every normalisation layer."""

from __future__ import annotations

from peft import LNTuningConfig
from torch import nn

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, register, require_targets


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LNTuningConfig:
    norms = [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm") or _is_t5_norm(module)
    ]
    if not norms:
        raise UserError("the base model has no LayerNorm: there is nothing for this method to train")
    return LNTuningConfig(
        task_type=task.peft_type or None,
        target_modules=require_targets(base.model, config.target_modules) or norms,
        modules_to_save=list(base.head) or None,
    )


def _is_t5_norm(module: nn.Module) -> bool:
    return type(module).__name__ == "T5LayerNorm"


def _meaning(name: str) -> tuple[str, Averaging]:
    return ("norm", "linear") if ".ln_tuning_layers." in name else ("head", "nonlinear")


register(
    Method(
        name="ln",
        summary="scale and shift of every LayerNorm",
        source="Qi et al. 2022, arXiv 2211.08682; Zhao et al. 2023, arXiv 2312.11420",
        configure=_configure,
        meaning=_meaning,
        accepts=frozenset({"target_modules"}),
        equation="y = (gamma0 + dgamma) norm(x) + beta0 + dbeta",
        federates="averages exactly within a layer",
        privacy="exact clipping; 2 d numbers a LayerNorm",
        kind="partial",
    )
)
