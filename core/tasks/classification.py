"""What text and image classification share: one label an example, cross-entropy, accuracy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..basemodel import BaseModel, describe, load_pretrained, load_processor
from ..config import TaskConfig
from .base import Batch, head_modules, padding_id


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
            # Decoder-only classifiers find the last token of a text by this id.
            network.config.pad_token_id = padding_id(processor)
        return describe(network, processor, missing, head_modules(network, self.heads))

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="none")

    def counts(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = self._logits(model, batch)
        return {
            "examples": len(logits),
            "correct": int((logits.argmax(-1) == batch["labels"]).sum()),
            "loss_sum": float(F.cross_entropy(logits, batch["labels"], reduction="sum")),
        }

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**{key: batch[key] for key in self.inputs}).logits.float()
