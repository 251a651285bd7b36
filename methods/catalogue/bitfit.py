"""BitFit: train the biases of the base model, and nothing else but the head."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, attention_targets, register


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    # PEFT has no BitFit, but its LoRA saves and loads all biases on request. One frozen rank-1 update that is zero
    # carries them, so the exported folder loads with plain PEFT and computes exactly the BitFit model.
    leaf = attention_targets(base.model, MethodConfig())[0]
    carrier = next(name for name, _ in base.model.named_modules() if name.rsplit(".", 1)[-1] == leaf)
    return LoraConfig(
        task_type=task.peft_type or None,
        r=1,
        lora_alpha=1,
        target_modules=[carrier],
        bias="all",
        modules_to_save=list(base.head) or None,
    )


def _prepare(model: PeftModel) -> None:
    biases = 0
    for name, parameter in model.named_parameters():
        head = ".modules_to_save." in name
        bias = name.endswith(".bias") and ".original_module." not in name
        parameter.requires_grad_(head or bias)
        biases += bias and not head
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    if not biases:
        raise UserError("the base model has no biases, so BitFit would train nothing but the head; choose ln or lora")


def _meaning(name: str) -> tuple[str, Averaging]:
    return ("head", "nonlinear") if ".modules_to_save." in name else ("bias", "linear")


register(
    Method(
        name="bitfit",
        summary="the biases of the base model",
        source="Ben Zaken et al. 2022, arXiv 2106.10199",
        configure=_configure,
        prepare=_prepare,
        meaning=_meaning,
        equation="b = b0 + db for every bias b0",
        federates="averages exactly",
        privacy="exact clipping; one number a bias, the least noise of all",
        kind="partial",
        contract={"unfit": {"llama": "no biases", "t5": "no biases"}},
    )
)
