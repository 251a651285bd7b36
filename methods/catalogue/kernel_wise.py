"""Kernel-wise adapter ("kernel-mix"): attention's heads are kernels of their own, so each has factors of its own.

Beside them stand factors that all heads have in common, as LoRA has. The authors' biases of the factors are left out,
since ``bitfit`` is a method by itself; and both kinds of factors of values read the block's input, where the authors'
code can also read the head's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import dense_weight, head_width, is_turned, layers_of, shape_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register


class KernelOptions(MethodOptions):
    share: int = Field(4, ge=1, description="rank of the factors that all heads have in common")


class HeadFactors(nn.Module):
    """dW (m, n) = rows B_h A_h of each head h, one below the other, plus B A of rank ``share``.

    A_h (r, n) and B_h (m / H, r) for ``heads`` = H heads; all B start at zero.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, rank: int, share: int) -> None:
        super().__init__()
        self.own_a = nn.Parameter(torch.empty(heads, rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.own_b = nn.Parameter(torch.zeros(heads, outputs // heads, rank))
        self.common_a = nn.Parameter(torch.empty(share, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.common_b = nn.Parameter(torch.zeros(outputs, share))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("...n,hrn->...hr", x, self.own_a)
        own = torch.einsum("...hr,hpr->...hp", inner, self.own_b).flatten(-2)
        return own + F.linear(F.linear(x, self.common_a), self.common_b)

    def dense(self) -> torch.Tensor:
        return torch.einsum("hpr,hrn->hpn", self.own_b, self.own_a).flatten(0, 1) + self.common_b @ self.common_a


class MergingFactors(nn.Module):
    """The same for the layer behind attention: dW (m, n) = columns B_h A_h of each head, side by side, plus B A.

    A_h (r, n / H) and B_h (m, r), the columns of ``own_b`` (m, H r).
    """

    def __init__(self, inputs: int, outputs: int, heads: int, rank: int, share: int) -> None:
        super().__init__()
        width = inputs // heads
        self.own_a = nn.Parameter(torch.empty(heads, rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.own_b = nn.Parameter(torch.zeros(outputs, heads * rank))
        self.common_a = nn.Parameter(torch.empty(share, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.common_b = nn.Parameter(torch.zeros(outputs, share))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (len(self.own_a), -1))
        inner = torch.einsum("...hd,hrd->...hr", parts, self.own_a).flatten(-2)
        return F.linear(inner, self.own_b) + F.linear(F.linear(x, self.common_a), self.common_b)

    def dense(self) -> torch.Tensor:
        rows = self.own_b.unflatten(1, self.own_a.shape[:2])
        return torch.einsum("mhr,hrd->mhd", rows, self.own_a).flatten(1) + self.common_b @ self.common_a


class KernelUpdate(Part):
    """W0 x + (alpha / r) dW x, the heads being rows of dW."""

    factors: type[nn.Module] = HeadFactors

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.scaling = setting.config.alpha / setting.config.rank
        self.update: Any = self.made(*shape_of(base), setting)

    def made(self, inputs: int, outputs: int, setting: Setting) -> nn.Module:
        heads = setting.config.sizes[setting.path]
        return self.factors(inputs, outputs, heads, setting.config.rank, setting.options.share)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.update(x.to(self.update.own_a.dtype))
        return change * self.scaling

    def change(self) -> torch.Tensor:
        """(alpha / r) dW (m, n)."""
        dense: torch.Tensor = self.update.dense()
        return dense * self.scaling

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        return y + self.added(x).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        weight, change = dense_weight(base), self.change()
        return {"weight": weight + (change.T if is_turned(base) else change).to(weight.dtype)}


class MergingUpdate(KernelUpdate):
    """The same, the heads being columns of dW."""

    factors = MergingFactors


class FusedUpdate(KernelUpdate):
    """The same for one layer that gives queries, keys and values: the keys stay."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.values: Any = self.made(*shape_of(base), setting)

    def made(self, inputs: int, outputs: int, setting: Setting) -> nn.Module:
        return super().made(inputs, outputs // 3, setting)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        queries = super().added(x)
        values = self.values(x.to(queries.dtype)) * self.scaling
        return torch.cat([queries, torch.zeros_like(queries), values], dim=-1)

    def change(self) -> torch.Tensor:
        queries = super().change()
        return torch.cat([queries, torch.zeros_like(queries), self.values.dense() * self.scaling])


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    sizes: dict[str, int] = {}
    modules = dict(base.model.named_modules())
    for layer in layers_of(base.model):
        for attention in layer.attentions:
            width = head_width(modules[attention.module])
            kinds = {attention.query: "fused" if attention.fused else "rows", attention.output: "columns"}
            if not attention.fused:
                kinds[attention.value] = "rows"
            for path, kind in kinds.items():
                inputs, outputs = shape_of(modules[path])
                sizes[path] = {"rows": outputs, "columns": inputs, "fused": outputs // 3}[kind] // width
            places |= kinds
    return graft_config("kernel-wise", places, config, task, base, sizes)


register(
    Method(
        name="kernel-wise",
        summary="factors of each attention head's own in query, value and output, and common ones",
        source="Chen et al. 2022, arXiv 2205.03720",
        equation="W_h = W0_h + (alpha / r) (B_h A_h + [B A]_h) for head h of query, value (rows) and output (columns)",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; H r (n + w) + s (m + n) numbers a layer, H heads of width w",
        configure=_configure,
        meaning=meaning_by(("_a", "factor_A", "product"), ("_b", "factor_B", "product")),
        parts={"rows": KernelUpdate, "columns": MergingUpdate, "fused": FusedUpdate},
        Options=KernelOptions,
        uses_rank=True,
        contract={"settings": {"options": {"share": 2}}},
    )
)
