"""Sparse changes under a fixed mask: FISH mask, Child-Tuning D, SAM, LT-SFT, and masks that need no records.

They differ in which weights train; how, is the same. The mask is made once, of records that everyone may see
(`fedgraft methods mask`) or of none, and is the same at every site: it belongs to the adapter and crosses once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import dense_weight, is_turned, shape_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..importance import load_mask
from ..registry import Method, MethodOptions, meaning_by, register
from .masks import places_of


class DataFreeOptions(MethodOptions):
    """``keep``: the share of a layer's weights that train; ``choice``: which; ``projection_seed``: of a drawn mask."""

    keep: float = Field(0.005, gt=0, le=1, description="share of a layer's weights that train")
    choice: Literal["magnitude", "random"] = Field("magnitude", description="the largest weights, or drawn ones")
    projection_seed: int = Field(0, ge=0, description="seed of a drawn mask, the same for all sites")


class SparseChange(Part):
    """y_i += v x_j for each chosen weight (i, j): dW with the trained ``values`` at the frozen ``places``."""

    frozen = frozenset({"places"})

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.inputs, self.outputs = shape_of(base)
        places = self._chosen(base, setting)
        if int(places.max()) >= 2**24 or bool((places >= torch.tensor([self.outputs, self.inputs])).any()):
            raise UserError(f"the mask has places outside of layer {setting.path}; make it of the same base model")
        # float32 holds every row and column exactly, and is what crosses the wire.
        self.places = nn.Parameter(places.float(), requires_grad=False)
        self.values = nn.Parameter(torch.zeros(len(places)))

    def _chosen(self, base: nn.Module, setting: Setting) -> torch.Tensor:
        options, mask, size = setting.options, setting.config.mask, setting.config.sizes.get(setting.path)
        if size is not None:
            # A saved adapter brings its places along, and is loaded where there is no such file.
            if not Path(mask).is_file():
                return torch.zeros(size, 2, dtype=torch.int32)
            return setting.remembered("mask", lambda: load_mask(mask))[setting.path]
        size = self.inputs * self.outputs
        if options.choice == "random":
            scores = setting.drawn(size, key="mask")
        else:
            weight = dense_weight(base).detach()
            scores = (weight.T if is_turned(base) else weight).abs().flatten()
        if scores.is_meta:
            scores = torch.zeros(size)
        flat = scores.topk(max(1, round(options.keep * size))).indices.sort().values
        return torch.stack((flat // self.inputs, flat % self.inputs), 1)

    def _at(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.places.round().long().unbind(1)
        return rows.clamp(0, self.outputs - 1), columns.clamp(0, self.inputs - 1)

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        rows, columns = self._at()
        added = x.to(self.values.dtype).index_select(-1, columns) * self.values
        return y + torch.zeros_like(y, dtype=added.dtype).index_add(-1, rows, added).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        change = self.values.new_zeros(self.outputs, self.inputs).index_put(self._at(), self.values, accumulate=True)
        return {"weight": dense_weight(base) + (change.T if is_turned(base) else change)}


def _data_free(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("sparse", places_of(config, base), config, task, base)


def _masked(name: str, config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    if not config.mask:
        raise UserError(
            f"method {name} trains the weights of a mask: set method.mask to a file from `fedgraft methods mask {name}`"
        )
    mask, modules = load_mask(config.mask), dict(base.model.named_modules())
    odd = sorted(set(mask) - set(modules))
    if odd:
        raise UserError(f"{config.mask}: the model has no layer {odd[0]}; choose a mask of the same base model")
    sizes = {path: len(places) for path, places in mask.items()}
    return graft_config(name, dict.fromkeys(mask, "change"), config, task, base, sizes)


_COMMON: dict[str, Any] = {
    "federates": "averages exactly within a layer; the mask is the same everywhere and crosses once",
    "meaning": meaning_by((".values", "weight", "linear"), (".places", "mask", "nonlinear")),
    "frozen": lambda name: name.endswith(".places"),
    "parts": {"change": SparseChange},
    "kind": "partial",
}
_PRIVACY = "exact clipping of the chosen weights alone; the mask spends nothing, as no patient's record may make it"

register(
    Method(
        name="sparse",
        summary="few weights of each layer, the largest or drawn ones",
        source="Ansell et al. 2024, arXiv 2401.16405 (fixed masks); Xu and Zhang 2024, arXiv 2405.02596 (drawn)",
        equation="W = W0 + M * dW, M the largest |W0| or drawn from a shared seed",
        privacy="exact clipping of the chosen weights alone; the mask needs no record",
        configure=_data_free,
        accepts=frozenset({"target_modules"}),
        Options=DataFreeOptions,
        **_COMMON,
    )
)
for _name, _summary, _source, _equation in (
    (
        "fish",
        "the weights with the largest Fisher information",
        "Sung et al. 2021, arXiv 2111.09839",
        "W = W0 + M * dW, M the largest (1/N) sum (dL_i/dw)^2",
    ),
    (
        "child-tuning-d",
        "the child network with the largest Fisher information",
        "Xu et al. 2021, arXiv 2109.05687",
        "w <- w - eta M * dL/dw, M the largest (1/N) sum (dL_i/dw)^2",
    ),
    (
        "sam",
        "the weights with the largest second-order gain",
        "Fu et al. 2023, arXiv 2211.15583",
        "W = W0 + M * dW, M the largest |(dL/dw)^2 / h| with equal h",
    ),
    (
        "lt-sft",
        "the weights that a short training of all moves farthest, from their first values",
        "Ansell et al. 2022, arXiv 2110.07560",
        "W = W0 + M * dW, M the largest |theta_1 - theta_0|",
    ),
):
    register(
        Method(
            name=_name,
            summary=_summary,
            source=_source,
            equation=_equation,
            privacy=_PRIVACY,
            configure=partial(_masked, _name),
            accepts=frozenset({"mask"}),
            **_COMMON,
        )
    )
