"""SPoT: prompt tuning that begins with a prompt trained on another task."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import hidden_width
from ..registry import Method, register
from ..sourceprompts import source_prompts
from .prefix import virtual_token_meaning
from .prompt import prompt_config


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> PromptTuningConfig:
    made = prompt_config(config, task, base)
    if len(config.experts) > 1:
        raise UserError("method spot begins with one prompt: leave one folder in method.experts, or choose attempt")
    source_prompts("spot", config.experts, hidden_width(base.model), config.virtual_tokens)
    return made


def _build(model: PeftModel, config: MethodConfig) -> None:
    prompt: Any = model.prompt_encoder["default"]
    weight = prompt.embedding.weight
    (source,) = source_prompts("spot", config.experts, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        weight.copy_(source)


register(
    Method(
        name="spot",
        summary="virtual token embeddings before the text, from a prompt of another task (method.experts)",
        source="Vu et al. 2022, arXiv 2110.07904",
        configure=_configure,
        build=_build,
        meaning=virtual_token_meaning,
        accepts=frozenset({"experts"}),
        equation="[P; E x], P first the prompt of a source task",
        federates="averaged position by position; the mean is not the mean of the functions",
        privacy="exact clipping; p d numbers; the source has paid its own",
        kind="prompt",
        merges=False,
        contract={
            "unfit": {
                "t5": "choose lora",
                "vit": "choose lora",
                "gpt2/sequence-classification": "choose prefix",
                "llama/sequence-classification": "choose prefix",
            }
        },
    )
)
