"""PiSSA and OLoRA: LoRA that starts from a part of the base weight, W = W0 + s (B A - B0 A0).

PEFT takes the first product out of the base weight. Here the base stays, and the first factors belong to the adapter,
frozen; a saved folder is a plain LoRA of twice the rank, with factors [A; A0] and [B, -B0].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ...core.config import MethodConfig
from ...core.errors import UserError
from ..bases import bases_of
from ..registry import Method, meaning_by, register
from .lora import LORA_ACCEPTS, lora_config

_ADAPTER = "default"


class FirstA(nn.Module):
    """x -> (A x, A0 x), side by side; A0 is called ``first``."""

    def __init__(self, first: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(first.clone())
        self.first = nn.Parameter(first.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, self.weight), F.linear(x, self.first)], dim=-1)

    def whole(self) -> torch.Tensor:
        return torch.cat([self.weight, self.first])

    def take(self, whole: torch.Tensor) -> None:
        self.weight.copy_(whole[: len(self.weight)])
        self.first.copy_(whole[len(self.weight) :])


class FirstB(nn.Module):
    """(a, a0) -> B a - B0 a0; B0 is called ``first``."""

    def __init__(self, first: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(first.clone())
        self.first = nn.Parameter(first.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now, first = x.chunk(2, dim=-1)
        return F.linear(now, self.weight) - F.linear(first, self.first)

    def whole(self) -> torch.Tensor:
        return torch.cat([self.weight, -self.first], dim=1)

    def take(self, whole: torch.Tensor) -> None:
        rank = self.weight.shape[1]
        self.weight.copy_(whole[:, :rank])
        self.first.copy_(-whole[:, rank:])


def _layers(model: PeftModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _pissa(layer: Any, name: str, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 (m, r) and A0 (r, n) with s B0 A0 = SVD_r(W0), the singular values shared by both."""
    u, vt = bases_of(layer, name, rank, "svd")
    values = ((u.T @ _weight(layer)) * vt).sum(1).clamp(min=0)
    root = (values / scaling).sqrt()
    return u * root, root[:, None] * vt


def _olora(layer: Any, name: str, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 (m, r) and A0 (r, n), the first columns of Q and rows of R of the QR decomposition of W0."""
    bases_of(layer, name, rank, "orthonormal")  # refuses what has no room for the rank
    q, r = torch.linalg.qr(_weight(layer))
    return q[:, :rank], r[:rank]


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise UserError(f"{type(layer.get_base_layer()).__name__} is quantised or no plain matrix: choose lora")
    return (weight.T if layer.fan_in_fan_out else weight).detach().double()


def _build(model: PeftModel, config: MethodConfig, start: Any) -> None:
    for name, layer in _layers(model):
        if not isinstance(dict(layer.lora_A).get(_ADAPTER), nn.Linear):
            raise UserError(f"method {config.name} fits linear layers; leave {name} out of method.target_modules")
        like = layer.lora_A[_ADAPTER].weight
        path = name.removeprefix("base_model.model.")
        b, a = start(layer, path, config.rank, float(layer.scaling[_ADAPTER]))
        layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER] = FirstA(a.to(like)), FirstB(b.to(like))
    # What is saved has the rank of both products, and the scaling of one.
    saved: Any = model.peft_config[_ADAPTER]
    saved.r, saved.lora_alpha = 2 * saved.r, 2 * saved.lora_alpha


@contextmanager
def _plain(model: PeftModel) -> Iterator[None]:
    """Within, the model is an ordinary LoRA of twice the rank."""
    swapped = []
    for _, layer in _layers(model):
        for factors in (layer.lora_A, layer.lora_B):
            factor: Any = factors[_ADAPTER]
            whole = factor.whole().detach()
            linear = nn.Linear(whole.shape[1], whole.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(whole, requires_grad=False)
            swapped.append((factors, factor, linear, linear.weight._version))
            factors[_ADAPTER] = linear
    try:
        yield
    finally:
        for factors, factor, linear, version in swapped:
            factors[_ADAPTER] = factor
            if linear.weight._version != version:
                with torch.no_grad():
                    factor.take(linear.weight)


def _method(name: str, start: Any, **words: Any) -> Method:
    return Method(
        name=name,
        configure=lora_config,
        build=lambda model, config: _build(model, config, start),
        frozen=lambda tensor: tensor.endswith(".first"),
        plain=_plain,
        meaning=meaning_by(
            (".first", "basis", "nonlinear"), (".lora_A.", "lora_A", "product"), (".lora_B.", "lora_B", "product")
        ),
        uses_rank=True,
        accepts=LORA_ACCEPTS,
        options={"common_rank": True},
        privacy="exact clipping; r (m + n) numbers a layer; the first factors come of the base weights alone",
        **words,
    )


_FEDERATES = "averaged factor by factor, which is not the mean of the products; B0 and A0 cross once"
register(
    _method(
        "pissa",
        _pissa,
        summary="LoRA from the principal singular vectors of the base weight",
        source="Meng et al. 2024, arXiv 2404.02948",
        equation="W = W0 + s (B A - B0 A0), at first s B0 A0 = SVD_r(W0)",
        federates=_FEDERATES,
    )
)
register(
    _method(
        "olora",
        _olora,
        summary="LoRA from the QR decomposition of the base weight",
        source="Buyukakyuz 2024, arXiv 2406.01775",
        equation="W = W0 + s (B A - B0 A0), at first B0 = Q[:, :r], A0 = R[:r], Q R = W0",
        federates=_FEDERATES,
    )
)
