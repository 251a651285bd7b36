"""KAdaptation: a sum of Kronecker products of small matrices that all layers share with low-rank ones of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import dense_weight, is_turned, shape_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, attention_targets, meaning_by, register


class KadaptationOptions(MethodOptions):
    """``terms``: how many products are summed, and the width of the shared matrices."""

    terms: int = Field(4, ge=1, description="t: products in the sum, and rows of each shared matrix")


class SharedMatrices(nn.Module):
    """A_i (t, t) for i = 1..t, of all layers together."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(terms, terms, terms) / terms)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """(..., i, b, r) -> (..., i, a, r)"""
        return torch.einsum("...ibr,iab->...iar", blocks, self.matrices)


class LowRankBlocks(nn.Module):
    """Matrices V_i (r, n) or U_i (m, r), one for each term of the sum."""

    def __init__(self, terms: int, rows: int, columns: int, zero: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(terms, rows, columns))
        if not zero:
            nn.init.normal_(self.weight, std=columns**-0.5)


class Down(LowRankBlocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...bn,irn->...ibr", x, self.weight)


class Up(LowRankBlocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...iar,imr->...am", x, self.weight)


class KroneckerSum(Part):
    """dW = (alpha / r) sum_i A_i kron (U_i V_i), A_i (t, t) shared, U_i (m / t, r), V_i (r, n / t)."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        terms, rank = setting.options.terms, setting.config.rank
        n, m = shape_of(base)
        if n % terms or m % terms:
            raise UserError(
                f"layer {setting.path} is {m} x {n}, which {terms} does not divide; set method.options.terms"
            )
        self.terms, self.scaling = terms, setting.config.alpha / rank
        self.shared = setting.shared("matrices", lambda: SharedMatrices(terms))
        self.down = Down(terms, rank, n // terms, zero=False)
        self.up = Up(terms, m // terms, rank, zero=True)

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        blocks = x.to(self.down.weight.dtype).unflatten(-1, (self.terms, -1))
        return y + (self.scaling * self.up(self.shared(self.down(blocks))).flatten(-2)).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        weight = dense_weight(base)
        products = self.up.weight @ self.down.weight
        shared: Any = self.shared
        terms = [torch.kron(a, b) for a, b in zip(shared.matrices, products, strict=True)]
        change = self.scaling * torch.stack(terms).sum(0)
        return {"weight": weight + (change.T if is_turned(base) else change)}


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    targets = tuple(f".{name}" for name in attention_targets(base.model, config))
    places = {name: "change" for name, _ in base.model.named_modules() if f".{name}".endswith(targets)}
    return graft_config("kadaptation", places, config, task, base)


register(
    Method(
        name="kadaptation",
        summary="dW = sum_i A_i kron (U_i V_i), the A_i shared by all layers",
        source="He et al. 2022, arXiv 2203.16329",
        equation="W = W0 + (alpha / r) sum_i A_i kron (U_i V_i), A_i (t, t) shared, U_i (m/t, r), V_i (r, n/t)",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; r (m + n) numbers a layer and t^3 in all, three factors multiply their noise",
        configure=_configure,
        meaning=meaning_by(
            (".shared.", "kronecker", "product"), (".down.", "factor", "product"), (".up.", "factor", "product")
        ),
        parts={"change": KroneckerSum},
        uses_rank=True,
        options={"common_rank": True},
        accepts=frozenset({"target_modules"}),
        Options=KadaptationOptions,
    )
)
