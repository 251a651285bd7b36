"""LoRA-SB and Ravan: small matrices trained between frozen factors, W0 + s B R A."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..bases import bases_of
from ..registry import Method, register
from .lora import LORA_ACCEPTS, lora_config

_ADAPTER = "default"
_HEADS = 4


class HeadCores(nn.Module):
    """Square matrices ``heads`` (h, r, r) along a diagonal, each times its number in ``scale`` (h)."""

    def __init__(self, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.zeros(heads, rank, rank))
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, self.heads.shape[:2])
        return torch.einsum("...hr,hqr->...hq", parts, self.heads * self.scale[:, None, None]).flatten(-2)

    def matrix(self) -> torch.Tensor:
        return torch.block_diag(*(self.heads * self.scale[:, None, None]))


class CoreFactor(nn.Sequential):
    """What stands in the place of LoRA's A: a frozen ``basis`` A, then a trained ``core`` R.

    ``weight`` is their product R A, by which PEFT merges.
    """

    def __init__(self, basis: nn.Linear, core: nn.Linear | HeadCores) -> None:
        super().__init__(OrderedDict(basis=basis, core=core))

    @property
    def weight(self) -> torch.Tensor:
        core: Any = self.core
        basis: Any = self.basis
        return (core.weight if isinstance(core, nn.Linear) else core.matrix()) @ basis.weight


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _heads(config: MethodConfig) -> int:
    return config.heads or _HEADS


def _build(model: PeftModel, config: MethodConfig, heads: int) -> None:
    """Freeze both factors at orthonormal bases, and put zero cores between them; ``heads`` 0: one whole square."""
    for name, layer in _layers(model):
        a = dict(layer.lora_A).get(_ADAPTER)
        if not isinstance(a, nn.Linear):
            raise UserError(f"method {config.name} fits linear layers; leave {name} out of method.target_modules")
        b: Any = layer.lora_B[_ADAPTER]
        left, right = bases_of(layer, name.removeprefix("base_model.model."), a.out_features, config.init or "svd")
        core: Any = HeadCores(heads, config.rank) if heads else nn.Linear(a.out_features, a.out_features, bias=False)
        core.to(a.weight)
        with torch.no_grad():
            a.weight.copy_(right)
            b.weight.copy_(left)
            if not heads:
                core.weight.zero_()
        a.weight.requires_grad_(False)
        b.weight.requires_grad_(False)
        layer.lora_A[_ADAPTER] = CoreFactor(a, core)


@contextmanager
def _plain(model: PeftModel) -> Iterator[None]:
    """Within, the model is an ordinary LoRA with A' = R A. A' that was loaded becomes the basis, with R = 1."""
    cores = [(layer, layer.lora_A[_ADAPTER]) for _, layer in _layers(model)]
    merged: list[tuple[nn.Linear, int]] = []
    for layer, factor in cores:
        product: torch.Tensor = factor.weight.detach()  # type: ignore[operator]
        linear = nn.Linear(product.shape[1], product.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(product.clone(), requires_grad=False)
        merged.append((linear, linear.weight._version))
        layer.lora_A[_ADAPTER] = linear
    try:
        yield
    finally:
        for (layer, factor), (linear, version) in zip(cores, merged, strict=True):
            layer.lora_A[_ADAPTER] = factor
            if linear.weight._version != version:
                _take(factor, linear.weight)


@torch.no_grad()
def _take(factor: Any, weight: torch.Tensor) -> None:
    factor.basis.weight.copy_(weight)
    core = factor.core
    if isinstance(core, nn.Linear):
        core.weight.copy_(torch.eye(len(core.weight)))
    else:
        core.heads.copy_(torch.eye(core.heads.shape[1]).expand_as(core.heads))
        core.scale.fill_(1.0)


def _frozen(name: str) -> bool:
    return ".lora_B." in name or name.endswith(".basis.weight")


def _meaning(name: str) -> tuple[str, Averaging]:
    for part, meaning in _MEANINGS.items():
        if part in name:
            return meaning
    return "head", "nonlinear"


# Beside frozen factors the core alone moves dW, which is linear in it; a head's scale multiplies its core.
_MEANINGS: dict[str, tuple[str, Averaging]] = {
    ".basis.weight": ("basis", "nonlinear"),
    ".lora_B.": ("basis", "nonlinear"),
    ".core.weight": ("core", "linear"),
    ".core.heads": ("core", "product"),
    ".core.scale": ("scale", "product"),
}


def _ravan_config(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    whole = config.model_copy(update={"rank": _heads(config) * config.rank})
    return lora_config(whole, task, base)


register(
    Method(
        name="lora-sb",
        summary="dW = (alpha / r) B R A: B and A are frozen singular vectors of W0, R (r x r) trains",
        source="Ponkshe et al. 2024, arXiv 2411.19557; Singhal et al. 2025, arXiv 2502.15436",
        configure=lora_config,
        build=lambda model, config: _build(model, config, heads=0),
        frozen=_frozen,
        plain=_plain,
        meaning=_meaning,
        uses_rank=True,
        accepts=LORA_ACCEPTS | {"init"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) B R A, B and A frozen, R (r, r)",
        federates="R averages exactly; the frozen bases cross once",
        privacy="exact clipping; r^2 numbers a layer, the best of the family at small epsilon",
    )
)
register(
    Method(
        name="ravan",
        summary="dW = (alpha / (h r)) sum_i s_i B_i H_i A_i over h heads: H_i (r x r) and s_i train",
        source="Raje et al. 2025, arXiv 2506.05568",
        configure=_ravan_config,
        build=lambda model, config: _build(model, config, heads=_heads(config)),
        frozen=_frozen,
        plain=_plain,
        meaning=_meaning,
        uses_rank=True,
        accepts=LORA_ACCEPTS | {"init", "heads"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / (h r)) sum_i s_i B_i H_i A_i, B_i and A_i frozen",
        federates="s_i H_i is what to average; averaged apart they are biased a little",
        privacy="exact clipping; h (r^2 + 1) numbers a layer",
    )
)
