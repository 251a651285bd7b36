"""Ladder side-tuning: a thin transformer beside the frozen one, and no gradient through the latter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width
from ..attending import require_whole
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..ladder import layers_in, run_frozen, stack_of, with_last
from ..registry import Method, MethodOptions, meaning_by, register
from ..smallattention import SmallAttention


class SideOptions(MethodOptions):
    """``reduction``: how many times thinner the side network is; ``temperature`` of its gates."""

    reduction: int = Field(8, ge=1, description="width of the model over that of the side network")
    heads: int = Field(4, ge=1, description="attention heads of the side network")
    temperature: float = Field(0.1, gt=0, description="temperature of the gates")


class SideBlock(nn.Module):
    """x + attention(LN x), then x + W2 gelu(W1 LN x), four times as wide within."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SmallAttention(width, heads, max(1, width // heads))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), seen)
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.inner_norm(x))))
        return out


class SideNetwork(Part):
    """g_0 = D_0 h_0; g_i = block_i(m_i D_i h_i + (1 - m_i) g_{i-1}), m_i = sigmoid(a_i / T); out: h_N + U g_N.

    h_i are the frozen layers' states. U starts at zero, and what the side network says is added to the frozen one's
    last states. Blocks are drawn: the paper's begin as a pruned copy of the frozen layers, whose layout is a family's.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options, width = setting.options, hidden_width(setting.model)
        thin, count = max(1, width // options.reduction), len(layers_in(base))
        self.temperature: float = options.temperature
        self.method = setting.config.method
        self.rungs = nn.ModuleList([nn.Linear(width, thin) for _ in range(count + 1)])
        self.gates = nn.Parameter(torch.zeros(count))
        self.blocks = nn.ModuleList([SideBlock(thin, options.heads) for _ in range(count)])
        self.out = nn.Linear(thin, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs["use_cache"] = False
        require_whole(base, args, kwargs, self.method)
        result, states, seen = run_frozen(base, args, kwargs)
        kind = self.out.weight.dtype
        side = self.rungs[0](states[0].to(kind))
        opened = torch.sigmoid(self.gates / self.temperature)
        for index, block in enumerate(self.blocks):
            rung = self.rungs[index + 1](states[index + 1].to(kind))
            side = block(rung * opened[index] + side * (1 - opened[index]), seen)
        last = result[0]
        return with_last(result, last + self.out(side).to(last.dtype))


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {stack_of(base.model, "ladder-side", "choose houlsby"): "side"}
    return graft_config("ladder-side", places, config, task, base)


register(
    Method(
        name="ladder-side",
        summary="a thin transformer beside the frozen one: no gradient and no memory in the latter",
        source="Sung et al. 2022, arXiv 2206.06522",
        equation="g_i = block_i(m_i D_i h_i + (1 - m_i) g_{i-1}), m_i = sigmoid(a_i / T); h_N + U g_N at the end",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 12 w^2 + d w numbers a layer at a width of w = d / reduction",
        configure=_configure,
        meaning=meaning_by(
            (".rungs.", "side", "nonlinear"),
            (".gates", "gate", "nonlinear"),
            (".blocks.", "side", "nonlinear"),
            (".out.", "side", "nonlinear"),
        ),
        parts={"side": SideNetwork},
        Options=SideOptions,
        kind="other additive",
        merges=False,
        contract={"settings": {"options": {"reduction": 4, "heads": 2}}, "unfit": {"t5": "choose houlsby"}},
    )
)
