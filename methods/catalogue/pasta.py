"""PASTA: trained vectors on the hidden states of special tokens, before every layer."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..attending import argument, first_of, with_first
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, create_method, meaning_by, register


class SpecialOptions(MethodOptions):
    """The ids of the special tokens; -1: those of the model's own tokenizer."""

    first: int = Field(-1, ge=-1, description="id of the token that stands for the text; -1: the tokenizer's")
    separator: int = Field(-1, ge=-1, description="id of the token that ends a sentence; -1: the tokenizer's")


class Special:
    """Where the special tokens of the present texts are: (B, L, 2), one number for each kind."""

    at: torch.Tensor | None = None


class SpecialVectors(Part):
    """h + e_1 at the first token and h + e_2 at every separator, h the input of a layer."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        special: Special = setting.remembered("special", Special)
        self.special = special
        self.vectors = nn.Parameter(torch.zeros(2, hidden_width(setting.model)))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = base(*args, **kwargs)
        h, at = first_of(given), self.special.at
        if at is None or at.shape[:2] != h.shape[:2]:
            raise UserError("pasta reads where the special tokens are from the texts' ids: give the model input_ids")
        # A sum with what belongs to the records, so that each has places of its own.
        own = h.new_zeros(*h.shape[:2], 2) + at.to(h.dtype)
        return with_first(given, h + own @ self.vectors.to(h.dtype))


class SpecialEmbeddings(SpecialVectors):
    """Around the embeddings: notes where the tokens are, and changes what the first layer reads."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.ids = (setting.options.first, setting.options.separator)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if min(self.ids) < 0:
            raise UserError("the tokenizer names no special tokens: set method.options.first and .separator")
        ids = argument(base, args, kwargs, "input_ids")
        self.special.at = None if ids is None else torch.stack([ids == one for one in self.ids], dim=-1)
        return super().forward(base, *args, **kwargs)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    options = create_method("pasta").options_of(config)
    layers = layers_of(base.model)
    embeddings = f"{layers[0].path.partition('.')[0]}.embeddings"
    # An encoder for texts: the layers add and normalise in one module, behind embeddings that read ids.
    if not layers[0].joins or embeddings not in dict(base.model.named_modules()):
        raise UserError(
            f"pasta marks the special tokens of an encoder like BERT; for {type(base.model).__name__}, choose bitfit"
        )
    ids = {"first": options.first, "separator": options.separator}
    # RoBERTa's tokens of these names are the ones that begin and end a text elsewhere.
    for key, names in (("first", ("cls", "bos")), ("separator", ("sep", "eos"))):
        told = (getattr(base.processor, f"{name}_token_id", None) for name in names)
        if ids[key] < 0:
            ids[key] = next((one for one in told if one is not None), -1)
    places = {embeddings: "first"} | {layer.path: "next" for layer in layers[:-1]}
    return graft_config("pasta", places, config.model_copy(update={"options": ids}), task, base)


register(
    Method(
        name="pasta",
        summary="trained vectors on the states of special tokens, before every layer",
        source="Yang et al. 2023, arXiv 2302.04166",
        equation="h_i <- h_i + e_1 where i is the first token, h_i + e_2 where i is a separator, before each layer",
        federates="e averages exactly: the mean is the mean of what is added",
        privacy="exact clipping; 2 d numbers a layer",
        configure=_configure,
        meaning=meaning_by((".vectors", "shift", "linear")),
        parts={"first": SpecialEmbeddings, "next": SpecialVectors},
        Options=SpecialOptions,
        kind="other additive",
        merges=False,
        contract={"unfit": dict.fromkeys(("gpt2", "llama", "t5", "vit"), "choose bitfit")},
    )
)
