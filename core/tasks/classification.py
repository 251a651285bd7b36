"""What text and image classification share: one label an example, cross-entropy, accuracy."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..basemodel import BaseModel, describe, load_pretrained, load_processor
from ..config import TaskConfig
from ..errors import UserError
from .base import Batch, Predictions, check_text_limits, head_modules, set_padding


class Classification:
    """Base of the classification tasks; a subclass names its Hugging Face classes and how an example is read."""

    name: str
    peft_type: str
    input_kind: str
    labelled = True
    auto_model: ClassVar[Any]
    auto_processor: ClassVar[Any]
    heads: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]]

    def __init__(self, config: TaskConfig) -> None:
        self.max_length = config.max_length

    def load(self, model: str, config: TaskConfig, seed: int) -> BaseModel:
        if len(config.labels) < 2:
            raise UserError(f"task.labels names {len(config.labels)} labels; {self.name} needs two or more")
        processor = load_processor(self.auto_processor, model)
        network, missing = load_pretrained(
            self.auto_model,
            model,
            seed,
            num_labels=len(config.labels),
            id2label=dict(enumerate(config.labels)),
            label2id={label: i for i, label in enumerate(config.labels)},
        )
        if self.input_kind == "text":
            set_padding(network, processor)
            check_text_limits(network, processor, config.max_length)
        return describe(network, processor, missing, head_modules(network, self.heads, missing))

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="none")

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        logits = self.logits(model, batch)
        return Predictions(logits[:, None], batch["labels"][:, None], logits.new_ones(len(logits), 1))

    def counts(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self.logits(model, batch)
        return {
            "examples": torch.ones(len(logits)),
            "correct": (logits.argmax(-1) == batch["labels"]).float(),
            "loss_sum": F.cross_entropy(logits, batch["labels"], reduction="none"),
        }

    def even_loss(self, model: nn.Module) -> float:
        return math.log(model.config.num_labels)  # type: ignore[union-attr, arg-type]

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The scores of the labels, (B, labels), before any softmax."""
        return model(**{key: batch[key] for key in self.inputs}).logits.float()
