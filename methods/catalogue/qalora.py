"""QA-LoRA: LoRA on averages of groups of inputs, which fits into the zero points of a quantised weight."""

from __future__ import annotations

from peft import LoraConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..registry import Method, MethodOptions, register
from ..wrapping import on_layers
from .lora import LORA_ACCEPTS, lora_meaning


class QALoraOptions(MethodOptions):
    qalora_group_size: int = Field(16, ge=1, description="inputs of a group; divides the layer's")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    return on_layers(
        LoraConfig,
        config,
        task,
        base,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_qalora=True,
    )


register(
    Method(
        name="qalora",
        summary="LoRA on the means of groups of inputs",
        source="Xu et al. 2023, arXiv 2309.14717",
        configure=_configure,
        meaning=lora_meaning,
        Options=QALoraOptions,
        uses_rank=True,
        accepts=LORA_ACCEPTS,
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) B A P, P the mean of every g inputs, A (r, n / g)",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; r (m + n / g) numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"qalora_group_size": 4}}},
    )
)
