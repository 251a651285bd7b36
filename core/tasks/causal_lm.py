"""Predict the next token of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..basemodel import BaseModel, describe, load_pretrained, load_processor
from ..config import TaskConfig
from .base import (
    Batch,
    Example,
    Predictions,
    check_text_limits,
    pad_tokens,
    padding_id,
    register,
    set_padding,
    tokenize,
)


@register("causal-lm")
class CausalLM:
    """Next-token cross-entropy, averaged over a text's own tokens; token accuracy and perplexity.

    The usual ``model(labels=...).loss`` averages over all tokens of the batch, so one person's text would rescale
    another's gradient and no bound on one person's influence would hold. Here each text is averaged by itself.
    """

    name = "causal-lm"
    peft_type = "CAUSAL_LM"
    input_kind = "text"
    labelled = False

    def __init__(self, config: TaskConfig) -> None:
        self.max_length = config.max_length

    def load(self, model: str, config: TaskConfig, seed: int) -> BaseModel:
        tokenizer = load_processor(AutoTokenizer, model)
        network, missing = load_pretrained(AutoModelForCausalLM, model, seed)
        set_padding(network, tokenizer)
        check_text_limits(network, tokenizer, config.max_length)
        return describe(network, tokenizer, missing, ())

    def encode(self, inputs: Sequence[Any], labels: Sequence[int] | None, processor: Any) -> list[Example]:
        ids = tokenize(processor, inputs, self.max_length)
        # A text of one token predicts nothing; an end token gives it a target.
        end = processor.eos_token_id if processor.eos_token_id is not None else padding_id(processor)
        ids = [row if len(row) > 1 else [*row, end, end][:2] for row in ids]
        return [{"ids": row, "length": len(row)} for row in ids]

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        return pad_tokens(examples, processor)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        tokens, _, mask = self._token_losses(model, batch)
        return (tokens * mask).sum(1) / mask.sum(1)

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        mask = batch["attention_mask"][:, 1:].float()
        return Predictions(self._logits(model, batch), batch["input_ids"][:, 1:], mask / mask.sum(1, keepdim=True))

    def counts(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        tokens, hits, mask = self._token_losses(model, batch)
        return {
            "examples": mask.sum(1),
            "correct": (hits * mask).sum(1),
            "loss_sum": (tokens * mask).sum(1),
        }

    def even_loss(self, model: nn.Module) -> float:
        return math.log(model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(B, T - 1, V), of each token but the first."""
        ids = batch["input_ids"]
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.float()
        # Prompt methods put virtual tokens before the text: the text's own positions are the last ones.
        return logits[:, -ids.shape[1] :][:, :-1]

    def _token_losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, hit and mask of each predicted token, each (B, T - 1)."""
        logits, targets = self._logits(model, batch), batch["input_ids"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses, (logits.argmax(-1) == targets).float(), batch["attention_mask"][:, 1:].float()
