"""Assign a text to one of a fixed set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .base import Batch, Example, pad_tokens, padding_id, register, tokenize
from .classification import Classification


@register("sequence-classification")
class SequenceClassification(Classification):
    """One label a text."""

    name = "sequence-classification"
    peft_type = "SEQ_CLS"
    input_kind = "text"
    auto_model = AutoModelForSequenceClassification
    auto_processor = AutoTokenizer
    heads = ("classifier", "score", "classification_head")
    inputs = ("input_ids", "attention_mask")

    def encode(self, inputs: Sequence[Any], labels: Sequence[int] | None, processor: Any) -> list[Example]:
        # An empty text has no token where the tokenizer adds none; the padding token stands in.
        ids = [row or [padding_id(processor)] for row in tokenize(processor, inputs, self.max_length)]
        return [
            {"ids": row, "label": int(label), "length": len(row)}
            for row, label in zip(ids, labels if labels is not None else [0] * len(ids), strict=True)
        ]

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        return {
            **pad_tokens(examples, processor),
            "labels": torch.tensor([example["label"] for example in examples]),
        }
