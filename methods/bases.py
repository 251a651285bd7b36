"""Orthonormal bases for low-rank factors: singular vectors of a base weight, or drawn ones."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from ..core.errors import UserError

#: Up to this many rows or columns the whole decomposition costs less than a second.
_WHOLE = 768


def singular_bases(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, rank) and V^T (rank, n) of the largest singular values of ``weight`` (m, n), in float64.

    The largest entry of each right vector is positive, so that signs do not hang on the routine. Of a very large
    weight they are those of a randomised decomposition (Halko et al. 2011), drawn from torch's generator.
    """
    wide = weight.detach().double()
    if min(wide.shape) <= _WHOLE:
        u, _, vt = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, _, v = torch.svd_lowrank(wide, q=min(2 * rank + 16, *wide.shape), niter=4)
        vt = v.T
    u, vt = u[:, :rank], vt[:rank]
    signs = torch.sign(vt.gather(1, vt.abs().argmax(1, keepdim=True)))
    return u * signs.T, vt * signs


def drawn_rows(rank: int, width: int) -> torch.Tensor:
    """``rank`` orthonormal rows of ``width`` numbers in float64, uniform over all such, from torch's generator."""
    q, r = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r))).T


def bases_of(layer: LoraLayer, name: str, rank: int, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, rank) and V^T (rank, n), orthonormal, for the adapted layer ``name``; ``init``: svd or orthonormal.

    Raises :class:`UserError` that names the layer when it has no room for so many directions, or no plain weight.
    """
    base: Any = layer.get_base_layer()
    n, m = layer.in_features or 0, layer.out_features or 0
    if rank > min(m, n):
        raise UserError(f"layer {name} is {m} x {n}, which has no {rank} directions; lower method.rank or method.heads")
    if init == "orthonormal":
        return drawn_rows(rank, m).T, drawn_rows(rank, n)
    weight = base.weight
    if not weight.is_floating_point() or weight.numel() != m * n:
        raise UserError(f"layer {name} is quantised or no matrix: set method.init=orthonormal")
    # Conv1D of GPT-2 keeps its weight transposed.
    return singular_bases(weight.T if getattr(layer, "fan_in_fan_out", False) else weight, rank)
