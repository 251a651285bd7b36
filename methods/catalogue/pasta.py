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


_AT = "special_tokens"


class WholeModel(Part):
    """Around the model: notes where the special tokens are, (B, L, 2), for the layers that it hands its arguments."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.ids = (setting.options.first, setting.options.separator)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if min(self.ids) < 0:
            raise UserError("the tokenizer names no special tokens: set method.options.first and .separator")
        ids = argument(base, args, kwargs, "input_ids")
        if ids is None:
            raise UserError("pasta reads where the special tokens are from the texts' ids: give the model input_ids")
        return base(*args, **kwargs, **{_AT: marks_of(ids, self.ids)})


def marks_of(ids: torch.Tensor, special: tuple[int, int]) -> torch.Tensor:
    """1 where a token (B, L) is the first, or the second, of ``special``: (B, L, 2)."""
    return torch.stack([ids == one for one in special], dim=-1)


class SpecialVectors(Part):
    """h + e_1 at the first token and h + e_2 at every separator, h what a layer gives to the next."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.ids = (setting.options.first, setting.options.separator)
        self.vectors = nn.Parameter(torch.zeros(2, hidden_width(setting.model)))

    def marks(self, base: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
        marks: torch.Tensor = kwargs[_AT]
        return marks

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = base(*args, **kwargs)
        h = first_of(given)
        return with_first(given, h + self.marks(base, args, kwargs).to(h.dtype) @ self.vectors.to(h.dtype))


class SpecialEmbeddings(SpecialVectors):
    """The same around the embeddings, which are given the ids themselves."""

    def marks(self, base: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
        return marks_of(argument(base, args, kwargs, "input_ids"), self.ids)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    options = create_method("pasta").options_of(config)
    layers = layers_of(base.model)
    whole = layers[0].path.partition(".")[0]
    embeddings = f"{whole}.embeddings"
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
    places = {whole: "whole", embeddings: "first"} | {layer.path: "next" for layer in layers[:-1]}
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
        parts={"whole": WholeModel, "first": SpecialEmbeddings, "next": SpecialVectors},
        Options=SpecialOptions,
        kind="other additive",
        merges=False,
        contract={"unfit": dict.fromkeys(("gpt2", "llama", "t5", "vit"), "choose bitfit")},
    )
)
