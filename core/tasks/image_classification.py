"""Assign an image to one of a fixed set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..errors import UserError
from .base import Batch, Example, register
from .classification import Classification


@register("image-classification")
class ImageClassification(Classification):
    """One label an image. Inputs are paths, read when a batch needs them."""

    name = "image-classification"
    # PEFT has no task type for images; without one it wraps the model as it is.
    peft_type = ""
    input_kind = "image"
    auto_model = AutoModelForImageClassification
    auto_processor = AutoImageProcessor
    heads = ("classifier", "head", "fc")
    inputs = ("pixel_values",)

    def encode(self, inputs: Sequence[Any], labels: Sequence[int] | None, processor: Any) -> list[Example]:
        return [
            {"image": image, "label": int(label), "length": 1}
            for image, label in zip(inputs, labels if labels is not None else [0] * len(inputs), strict=True)
        ]

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        images = [_read(example["image"]) for example in examples]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([example["label"] for example in examples]),
        }


def _read(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(Path(image)) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise UserError(f"{image}: not an image that can be read") from None
