"""Trainable tokens: the embeddings of a few tokens, and of no other."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, MethodOptions, attention_targets, meaning_by, register


class TokenOptions(MethodOptions):
    token_indices: tuple[int, ...] = Field((), description="ids of the tokens to train")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    tokens = TokenOptions.model_validate(dict(config.options)).token_indices
    if not task.peft_type or getattr(base.model.config, "is_encoder_decoder", False):
        # T5 looks its embeddings up past what PEFT puts around them.
        raise UserError(f"method trainable-tokens does not fit {type(base.model).__name__}: choose lora")
    if not tokens:
        raise UserError("method trainable-tokens: name them in method.options.token_indices, by their ids")
    model: Any = base.model
    table = model.get_input_embeddings()
    count = table.num_embeddings if isinstance(table, nn.Embedding) else 0
    for token in tokens:
        if not 0 <= token < count:
            raise UserError(f"method.options.token_indices: the model has no token {token}; leave it out")
    name = next(path for path, module in base.model.named_modules() if module is table)
    # PEFT's own tuner for tokens saves no head; its LoRA does both. One frozen rank-1 update that is zero carries them.
    leaf = attention_targets(base.model, MethodConfig())[0]
    carrier = next(path for path, _ in base.model.named_modules() if path.rsplit(".", 1)[-1] == leaf)
    return LoraConfig(
        task_type=task.peft_type or None,
        r=1,
        lora_alpha=1,
        target_modules=[carrier],
        trainable_token_indices={name: sorted(set(tokens))},
        modules_to_save=list(base.head) or None,
    )


def _prepare(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.requires_grad_(False)
            if ".lora_B." in name:
                torch.nn.init.zeros_(parameter)


register(
    Method(
        name="trainable-tokens",
        summary="the embeddings of the tokens in method.options.token_indices",
        source="PEFT's TrainableTokens; the rows of an embedding as in Lester et al. 2021, arXiv 2104.08691",
        configure=_configure,
        prepare=_prepare,
        meaning=meaning_by((".trainable_tokens_delta.", "embedding", "linear")),
        Options=TokenOptions,
        equation="E_i <- E0_i + dE_i for the named tokens i",
        federates="averages exactly",
        privacy="exact clipping; k d numbers for k tokens; the choice of tokens is part of the job, and public",
        kind="partial",
        contract={
            "unfit": {"t5": "choose lora", "vit": "choose lora"},
            "settings": {"options": {"token_indices": list(range(2, 40))}},
        },
    )
)
