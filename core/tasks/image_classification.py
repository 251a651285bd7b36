"""Assign an image to one of a fixed set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..errors import PrivateError, UserError, one_line
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
        images = [read_image(example["image"]) for example in examples]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([example["label"] for example in examples]),
        }


class Picture(Protocol):
    """An image that is made when it is asked for."""

    def picture(self) -> Image.Image: ...

    def content(self) -> bytes:
        """What tells it from others."""
        ...


def read_image(image: Path | Image.Image | Picture) -> Image.Image:
    """An 8-bit RGB image. Raises :class:`PrivateError` that names the file: its name may name a person."""
    if isinstance(image, Image.Image):
        return _to_rgb(image, "an image")
    if not isinstance(image, str | Path):
        return _to_rgb(image.picture(), "an image")
    try:
        with Image.open(Path(image)) as file:
            file.load()
            return _to_rgb(file, str(image))
    except UserError:
        raise
    except Exception as error:
        # Pillow has an exception of its own kind for almost every way in which a file can be damaged.
        raise PrivateError(f"{image}: not an image that can be read: {one_line(error)[:200]}") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Pillow's own conversion cuts 16-bit greys off at 255, which turns a radiograph white; they are scaled here."""
    if image.mode == "F":
        raise PrivateError(f"{name}: its pixels are floating-point numbers; save it with 8 or 16 bits a pixel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise PrivateError(f"{name}: its pixels do not fit into 16 bits; save it with 8 or 16 bits a pixel")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")
