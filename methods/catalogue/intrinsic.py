"""Intrinsic SAID: all weights move together, within a drawn subspace of few dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from scipy.linalg import hadamard
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..dense import WeightChange
from ..grafts import GraftConfig, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register
from .masks import places_of


class IntrinsicOptions(MethodOptions):
    """``dimensions``: of the subspace; ``projection_seed``: from which all sites draw the same one."""

    dimensions: int = Field(200, ge=1, description="dimensions of the subspace that all layers move in")
    projection_seed: int = Field(0, ge=0, description="seed of the projection, the same for all sites")


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x over the last dimension, whose size is a power of two; H has entries of +-1 and H H^T = size I.

    H is the Kronecker product of two small ones: two matrix products read x twice, where butterflies read it once for
    each power of two.
    """
    power = x.shape[-1].bit_length() - 1
    first, last = (torch.from_numpy(hadamard(2**each)).to(x) for each in (power // 2, power - power // 2))
    return (first @ x.unflatten(-1, (len(first), len(last))) @ last).flatten(-2)


class Coordinates(nn.Module):
    """Where in the subspace the model is: d numbers, of all layers together, from zero."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(dimensions))


class Projected(WeightChange):
    """dW = lambda M d, M the Fastfood transform H G Pi H B (Le et al. 2013), lambda a number of the layer's own.

    B: signs, Pi: a permutation, G: normal numbers, all drawn alike by every site. Where the size of the layer is no
    power of two the rest of the transform is left out. M is scaled so that a column has length one on average.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        dimensions = setting.options.dimensions
        wanted = self.inputs * self.outputs
        block = 2 ** math.ceil(math.log2(dimensions))
        count = math.ceil(wanted / block)
        self.shared = setting.shared("coordinates", lambda: Coordinates(dimensions))
        # Not a parameter's ones: at lambda 0 nothing would ever move.
        self.lambda_ = nn.Parameter(torch.ones(1))
        self.pad = block - dimensions
        signs = torch.sign(setting.drawn(count, block, key="signs"))
        normal = setting.drawn(count, block, key="normal")
        order = setting.drawn(count, block, key="order").argsort(-1)
        self.register_buffer("signs", signs, persistent=False)
        # |H G Pi H B d|^2 is block^2 |d|^2 a block on average, and the layer has this many of them.
        self.register_buffer("normal", normal / (block * math.sqrt(count)), persistent=False)
        self.register_buffer("order", order, persistent=False)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        shared: Any = self.shared
        signs, normal, order = (getattr(self, name) for name in ("signs", "normal", "order"))
        padded = torch.cat((shared.point, shared.point.new_zeros(self.pad)))
        mixed = walsh_hadamard(signs * padded)
        spread = walsh_hadamard(normal * torch.gather(mixed, -1, order)).flatten()
        return self.lambda_ * spread[: self.inputs * self.outputs].view(self.outputs, self.inputs)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("said", places_of(config, base), config, task, base)


register(
    Method(
        name="said",
        summary="all weights move within one drawn subspace of few dimensions",
        source="Aghajanyan et al. 2021, arXiv 2012.13255",
        equation="W_l = W0_l + lambda_l M_l d, d shared by all layers, M_l a Fastfood transform from a shared seed",
        federates="d averages exactly for given lambdas; lambda d is a product",
        privacy="exact clipping; as few numbers as dimensions and layers, the noise hardly grows",
        configure=_configure,
        meaning=meaning_by((".shared.", "coordinates", "product"), (".lambda_", "scale", "product")),
        parts={"change": Projected},
        accepts=frozenset({"target_modules"}),
        Options=IntrinsicOptions,
        kind="other reparameterised",
    )
)
