"""LoReFT: the hidden states of a layer, changed within a subspace of few dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..bases import drawn_rows
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register


class LoreftOptions(MethodOptions):
    """``spread``: standard deviation by which the first W differs from R."""

    spread: float = Field(0.0, ge=0, description="standard deviation of what the first W has beside R")


class Intervention(nn.Module):
    """h + R^T (W h + b - R h), R (r, d) with orthonormal rows: those of ``rotation`` by Gram and Schmidt, in order.

    W begins as R and b as zero, so that nothing changes at first.
    """

    def __init__(self, width: int, rank: int, spread: float) -> None:
        super().__init__()
        rows = drawn_rows(rank, width).float()
        self.rotation = nn.Parameter(rows)
        self.source = nn.Linear(width, rank)
        with torch.no_grad():
            self.source.weight.copy_(rows + spread * torch.randn_like(rows))
            self.source.bias.zero_()

    def rows(self) -> torch.Tensor:
        q, r = torch.linalg.qr(self.rotation.T)
        return (q * torch.sign(torch.diagonal(r))).T

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rows = self.rows()
        return h + torch.matmul(self.source(h) - F.linear(h, rows), rows)


class HiddenStates(Part):
    """What a whole layer gives, with an intervention at every position.

    The paper intervenes at chosen positions of the prompt; with padded batches of texts of any length, all of them
    are the choice that does not hang on a text's neighbours.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.intervention = Intervention(hidden_width(setting.model), setting.config.rank, setting.options.spread)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        h: torch.Tensor = out[0] if isinstance(out, tuple) else out
        wide = h.to(self.intervention.rotation.dtype)
        changed = self.intervention(wide).to(h.dtype)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    wanted = [layer for layer in layers_of(base.model) if not config.layers or layer.index in config.layers]
    return graft_config("loreft", {layer.path: "hidden" for layer in wanted}, config, task, base)


register(
    Method(
        name="loreft",
        summary="hidden states changed within a subspace of method.rank dimensions",
        source="Wu et al. 2024, arXiv 2404.03592",
        equation="h <- h + R^T (W h + b - R h), R (r, d) with orthonormal rows",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 r d + r numbers a layer",
        configure=_configure,
        meaning=meaning_by((".rotation", "basis", "nonlinear"), (".source.", "source", "nonlinear")),
        parts={"hidden": HiddenStates},
        uses_rank=True,
        uses_alpha=False,
        options={"common_rank": True},
        accepts=frozenset({"layers"}),
        Options=LoreftOptions,
        kind="other additive",
        merges=False,
    )
)
