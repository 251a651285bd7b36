"""LoRAPrune: LoRA on a base model without the heads and channels that the task needs least.

What goes is chosen by the paper's criterion and schedule, once, on records that everyone may see (`fedgraft methods
mask lora-prune`): sites would find other heads by their own gradients, and tell of their patients by them. The paper
prunes while it trains; here the factors begin anew, at all sites, on the pruned model. Weights that go are zeros: the
base model keeps its shape, and its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import is_turned, shape_of
from ..dense import upright
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..importance import load_kept
from ..pruning import blocks_of
from ..registry import Method, meaning_by, register


class PrunedLayer(Part):
    """s B A beside a layer of which the rows (or columns) ``kept`` are left; the factors have no others."""

    frozen = frozenset({"kept"})

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.inputs, self.outputs = shape_of(base)
        config = setting.config
        # A saved adapter brings its rows along, and is loaded where there is no such file.
        kept = torch.zeros(config.sizes[setting.path], dtype=torch.int32)
        if Path(config.mask).is_file():
            kept = setting.remembered("mask", lambda: load_kept(config.mask))[setting.path]
        # float32 holds every row and column exactly, and is what crosses the wire.
        self.kept = nn.Parameter(kept.float(), requires_grad=False)
        n, m = self.left(len(kept))
        self.lora_A, self.lora_B = nn.Linear(n, config.rank, bias=False), nn.Linear(config.rank, m, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = config.alpha / config.rank

    def left(self, kept: int) -> tuple[int, int]:
        """(inputs, outputs) of the factors."""
        raise NotImplementedError

    def at(self, most: int) -> torch.Tensor:
        return self.kept.round().long().clamp(0, most - 1)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        return added

    def change(self) -> torch.Tensor:
        """s B A, of what is left."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight


class PrunedRows(PrunedLayer):
    """y_k = (W0 x + b)_k + s (B A x)_k for each row k that is left, 0 elsewhere."""

    def left(self, kept: int) -> tuple[int, int]:
        return self.inputs, kept

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        at = self.at(self.outputs)
        left = y.index_select(-1, at) + self.added(x).to(y.dtype)
        return torch.zeros_like(y).index_copy(-1, at, left)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        weight, at = upright(base), self.at(self.outputs)
        pruned = torch.zeros_like(weight).index_copy(0, at, weight[at] + self.change())
        found = {"weight": pruned.T if is_turned(base) else pruned}
        bias: Any = getattr(base, "bias", None)
        if bias is not None:
            found["bias"] = torch.zeros_like(bias).index_copy(0, at, bias[at])
        return found


class PrunedColumns(PrunedLayer):
    """y = W0 M x + b + s B A M x, M x the inputs that are left."""

    def left(self, kept: int) -> tuple[int, int]:
        return kept, self.outputs

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        at = self.at(self.inputs)
        left = x.index_select(-1, at)
        y: torch.Tensor = base(torch.zeros_like(x).index_copy(-1, at, left), *args, **kwargs)
        return y + self.added(left).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        weight, at = upright(base), self.at(self.inputs)
        pruned = torch.zeros_like(weight).index_copy(1, at, weight[:, at] + self.change())
        return {"weight": pruned.T if is_turned(base) else pruned}


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    if not config.mask:
        raise UserError(
            "method lora-prune leaves out the heads and channels of a mask: set method.mask to a file from `fedgraft "
            "methods mask lora-prune`"
        )
    mask, places = load_kept(config.mask), {}
    for block in blocks_of(base.model):
        stay = torch.ones(block.units, dtype=torch.bool)
        for path, at in block.columns.items():
            stay = torch.isin(at, mask.get(path, torch.zeros(0))).all(1)
        for path, want in block.kept(stay).items():
            if not len(want) or not torch.equal(want, mask.get(path, torch.zeros(0)).long()):
                raise UserError(
                    f"{config.mask}: leaves no whole heads or channels of {path}; choose a mask of this model"
                )
            places[path] = "rows" if path in block.rows else "columns"
    odd = sorted(set(mask) - set(places))
    if odd:
        raise UserError(f"{config.mask}: the model has no layer {odd[0]}; choose a mask of the same base model")
    sizes = {path: len(kept) for path, kept in mask.items()}
    return graft_config("lora-prune", places, config, task, base, sizes)


register(
    Method(
        name="lora-prune",
        summary="low-rank updates of a base model without its least important heads and feed-forward channels",
        source="Zhang et al. 2023, arXiv 2305.18403",
        equation="W = M (W0 + (alpha / r) B A), M without the units of least [(dB A + B dA - dB dA) (W0 + B A)]^2",
        federates="averaged factor by factor; the mask is the same everywhere and crosses once",
        privacy="exact clipping of what is left; the mask spends nothing, as no patient's record may make it",
        configure=_configure,
        meaning=meaning_by(
            (".lora_A.", "factor", "product"), (".lora_B.", "factor", "product"), (".kept", "mask", "nonlinear")
        ),
        frozen=lambda name: name.endswith(".kept"),
        parts={"rows": PrunedRows, "columns": PrunedColumns},
        uses_rank=True,
        accepts=frozenset({"mask"}),
        options={"common_rank": True},
        kind="hybrid",
    )
)
