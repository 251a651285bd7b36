"""Visual prompt tuning: trained tokens among the patches of an image."""

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
from ..attending import first_of, with_first
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, create_method, meaning_by, register


class VisualPromptOptions(MethodOptions):
    """``deep``: new tokens before each layer, in the place of the last ones."""

    deep: bool = Field(True, description="new tokens before every layer, not before the first alone")


class Tokens(Part):
    """``method.virtual_tokens`` trained tokens (p, d) between an image's class token and its patches."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        width = hidden_width(setting.model)
        self.tokens = nn.Parameter(torch.empty(setting.config.virtual_tokens, width))
        # As wide as a projection of patches of this size is drawn.
        patch: Any = getattr(setting.model, "config", None)
        bound = (6 / (3 * patch.patch_size**2 + width)) ** 0.5
        nn.init.uniform_(self.tokens, -bound, bound)

    def put(self, h: torch.Tensor, skip: int) -> torch.Tensor:
        """``h`` (B, 1 + n, d) with the tokens after the first, instead of the ``skip`` that follow it."""
        tokens = h.new_zeros(len(h), *self.tokens.shape) + self.tokens.to(h.dtype)
        return torch.cat([h[:, :1], tokens, h[:, 1 + skip :]], dim=1)


class FirstTokens(Tokens):
    """Around the embedding of the image."""

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = base(*args, **kwargs)
        return with_first(given, self.put(first_of(given), 0))


class NextTokens(Tokens):
    """Around a layer: tokens of its own instead of those that the layers before have worked on."""

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base(self.put(args[0], len(self.tokens)), *args[1:], **kwargs)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    embeddings = [path for path, module in base.model.named_modules() if hasattr(module, "cls_token")]
    if len(embeddings) != 1 or not hasattr(getattr(base.model, "config", None), "patch_size"):
        raise UserError("visual-prompt puts tokens among the patches of an image; for a text, choose prompt or prefix")
    places = {embeddings[0]: "first"}
    if create_method("visual-prompt").options_of(config).deep:
        places |= {layer.path: "next" for layer in layers_of(base.model)[1:]}
    return graft_config("visual-prompt", places, config, task, base)


_TEXTS = ("bert", "roberta", "gpt2", "llama", "t5")

register(
    Method(
        name="visual-prompt",
        summary="virtual tokens among the patches of an image, before every layer or before the first",
        source="Jia et al. 2022, arXiv 2203.12119",
        equation="[c; P_i; x] <- layer i of [c; P_{i-1}; x], p trained tokens P_i a layer (deep) or P_0 alone",
        federates="averaged token by token; the mean is not the mean of the functions",
        privacy="exact clipping; p d numbers a layer, or p d in all",
        configure=_configure,
        meaning=meaning_by((".tokens", "prompt", "nonlinear")),
        parts={"first": FirstTokens, "next": NextTokens},
        Options=VisualPromptOptions,
        kind="prompt",
        merges=False,
        contract={"unfit": dict.fromkeys(_TEXTS, "choose prompt")},
    )
)
