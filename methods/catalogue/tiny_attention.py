"""Tiny-attention adapters: an attention of a few dimensions on what each attention gives."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..attending import argument, first_of, require_whole, uncached, visible, with_first
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register
from ..smallattention import SmallAttention


class TinyAttentionOptions(MethodOptions):
    """``heads`` of ``width`` dimensions each."""

    heads: int = Field(4, ge=1, description="heads of the tiny attention")
    width: int = Field(1, ge=1, description="dimensions of a head")


class AfterAttention(Part):
    """z + T(z), z what an attention gives before its residual connection."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.method = setting.config.method
        options = setting.options
        self.attention = SmallAttention(hidden_width(setting.model), options.heads, options.width)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        require_whole(base, args, kwargs, self.method)
        mask = argument(base, args, kwargs, "attention_mask", "mask")
        args, kwargs = uncached(base, args, kwargs)  # type: ignore[assignment]
        given = base(*args, **kwargs)
        z = first_of(given)
        return with_first(given, z + self.attention(z, visible(base, mask, z.shape[1], z.shape[1])))


class WithinAttention(AfterAttention):
    """The same where one module holds the attention and the sum with its input, which it normalises."""

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        block: Any = base
        require_whole(base, args, kwargs, self.method)
        x = argument(base, args, kwargs, "hidden_states")
        mask = argument(base, args, kwargs, "attention_mask")
        args, kwargs = uncached(base, args, kwargs)  # type: ignore[assignment]
        given = block.self(*args, **kwargs)
        z = block.output.dropout(block.output.dense(given[0]))
        z = z + self.attention(z, visible(block.self, mask, z.shape[1], z.shape[1]))
        return with_first(given, block.output.LayerNorm(z + x))


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        # The first is the layer's attention to itself.
        own = layer.attentions[0]
        places |= {own.joins.rpartition(".")[0]: "within"} if own.joins else {own.module: "after"}
    return graft_config("tiny-attention", places, config, task, base)


register(
    Method(
        name="tiny-attention",
        summary="an attention with heads of one dimension after each attention",
        source="Zhao et al. 2022, arXiv 2211.01979",
        equation="z <- z + O [softmax(q_h k_h^T / sqrt(w)) v_h]_h; q, k, v = Q z, K z, V z; before the residual sum",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 4 d h w + 3 h w + d numbers a layer",
        configure=_configure,
        meaning=meaning_by((".attention.", "adapter", "nonlinear")),
        parts={"after": AfterAttention, "within": WithinAttention},
        Options=TinyAttentionOptions,
        kind="adapter",
        merges=False,
    )
)
