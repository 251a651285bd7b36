"""S-BitFit and U-BitFit: the biases that a task needs, whole ones or single numbers of them.

Which these are is found once, on records that everyone may see (`fedgraft methods mask s-bitfit`), by the paper's
criterion, see :mod:`fedgraft.methods.biases`: sites would find others by their own records, and tell of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..biases import biases_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..importance import load_kept
from ..registry import Method, meaning_by, register


class KeptBias(Part):
    """y_k + v_k for each number k of the bias that is kept, from zero."""

    frozen = frozenset({"kept"})

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        bias: Any = base.bias
        self.width, config = bias.numel(), setting.config
        # A saved adapter brings its places along, and is loaded where there is no such file.
        kept = torch.zeros(config.sizes[setting.path], dtype=torch.int32)
        if Path(config.mask).is_file():
            kept = setting.remembered("mask", lambda: load_kept(config.mask))[setting.path]
        # float32 holds every place exactly, and is what crosses the wire.
        self.kept = nn.Parameter(kept.float(), requires_grad=False)
        self.values = nn.Parameter(torch.zeros(len(kept)))

    def shift(self) -> torch.Tensor:
        """What is added to the bias, (d)."""
        at = self.kept.round().long().clamp(0, self.width - 1)
        return self.values.new_zeros(self.width).index_add(0, at, self.values)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(*args, **kwargs)
        return y + self.shift().to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        bias: Any = base.bias
        return {"bias": bias + self.shift().to(bias.dtype)}


def _configure(name: str, config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    if not config.mask:
        raise UserError(
            f"method {name} trains the biases of a mask: set method.mask to a file from `fedgraft methods mask {name}`"
        )
    mask, biases = load_kept(config.mask), biases_of(base)
    for path, kept in mask.items():
        if path not in biases or not len(kept) or int(kept[-1]) >= biases[path].numel() or int(kept[0]) < 0:
            raise UserError(
                f"{config.mask}: the model has no such bias of {path}; choose a mask of the same base model"
            )
    sizes = {path: len(kept) for path, kept in mask.items()}
    return graft_config(name, dict.fromkeys(mask, "bias"), config, task, base, sizes)


_COMMON: dict[str, Any] = {
    "source": "Lawton et al. 2023, arXiv 2305.16597",
    "federates": "averages exactly; the mask is the same everywhere and crosses once",
    "privacy": "exact clipping of what is kept; the mask spends nothing, as no patient's record may make it",
    "meaning": meaning_by((".values", "bias", "linear"), (".kept", "mask", "nonlinear")),
    "frozen": lambda name: name.endswith(".kept"),
    "parts": {"bias": KeptBias},
    "accepts": frozenset({"mask"}),
    "kind": "partial",
}
register(
    Method(
        name="s-bitfit",
        summary="the biases of the layers where a task needs them most, whole",
        equation="b = b0 + db for the biases whose sum of -db dL/db is largest, in a training on public records",
        configure=partial(_configure, "s-bitfit"),
        **_COMMON,
    )
)
register(
    Method(
        name="u-bitfit",
        summary="the single numbers of biases that a task needs most",
        equation="b_k = b0_k + v_k for the numbers k of largest -db_k dL/db_k, in a training on public records",
        configure=partial(_configure, "u-bitfit"),
        **_COMMON,
    )
)
