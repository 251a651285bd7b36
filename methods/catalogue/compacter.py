"""Compacter and Compacter++: bottlenecks whose matrices are sums of Kronecker products with factors in common."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..bottleneck import ACTIVATIONS, Activation
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, create_method, meaning_by, register


class CompacterOptions(MethodOptions):
    """``division``: n, the products that are summed, and the side of the factors in common."""

    width: int = Field(24, ge=1, description="dimensions of the bottleneck")
    division: int = Field(4, ge=1, description="Kronecker products a matrix")
    activation: Activation = Field("gelu", description="nonlinearity of the bottleneck")


class Rule(nn.Module):
    """The factors A_i (n, n) of all matrices of an adapter, (n, n, n)."""

    def __init__(self, division: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(division, division, division))
        nn.init.normal_(self.a, std=0.01)


class KroneckerLinear(nn.Module):
    """W x + b with W = sum_i A_i kron (s_i t_i^T), A_i (n, n), s_i (outputs / n), t_i (inputs / n).

    x is read as n rows of inputs / n, so that no product is ever written out. ``zero``: s starts at zero.
    """

    def __init__(self, rule: Rule, inputs: int, outputs: int, zero: bool) -> None:
        super().__init__()
        n = len(rule.a)
        self.s = nn.Parameter(torch.zeros(n, outputs // n))
        self.t = nn.Parameter(torch.empty(n, inputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.t)
        if not zero:
            nn.init.xavier_uniform_(self.s)

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        rows = x.unflatten(-1, (len(a), -1))
        sums = torch.einsum("...bq,iq->...ib", rows, self.t)
        mixed = torch.einsum("...ib,iab->...ia", sums, a)
        return torch.einsum("...ia,ip->...ap", mixed, self.s).flatten(-2) + self.bias


class CompactAdapter(Part):
    """h + U act(D h) on the output of a module, before its residual connection; A is one for D, U and all places."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        options, width = setting.options, hidden_width(setting.model)
        rule: Any = setting.shared("rule", lambda: Rule(options.division))
        self.rule = rule
        self.down = KroneckerLinear(rule, width, options.width, zero=False)
        self.up = KroneckerLinear(rule, options.width, width, zero=True)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        a = self.rule.a
        return h + self.up(self.activation(self.down(h.to(a.dtype), a)), a).to(h.dtype)


def _configure(name: str, config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    options, width = create_method(name).options_of(config), hidden_width(base.model)
    if width % options.division or options.width % options.division:
        raise UserError(
            f"method.options.division = {options.division} divides not both the model's width {width} and the "
            f"bottleneck's {options.width}: set it to a common divisor"
        )
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        if name == "compacter":
            places |= {attention.output: "adapter" for attention in layer.attentions}
        places[layer.down] = "adapter"
    return graft_config(name, places, config, task, base)


_MEANING = meaning_by(
    (".rule.a", "kronecker_A", "product"),
    (".s", "kronecker_s", "product"),
    (".t", "kronecker_t", "product"),
    (".bias", "bias", "nonlinear"),
)

register(
    Method(
        name="compacter",
        summary="bottlenecks of Kronecker products, after attention and after the feed-forward block",
        source="Mahabadi et al. 2021, arXiv 2106.04647",
        equation="h <- h + U act(D h + b) + c, D and U each sum_i A_i kron (s_i t_i^T), A_i (n, n) common to all",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; n^3 numbers in all and 2 (d + w) + d + w a place",
        configure=lambda config, task, base: _configure("compacter", config, task, base),
        meaning=_MEANING,
        parts={"adapter": CompactAdapter},
        Options=CompacterOptions,
        kind="adapter",
        merges=False,
    )
)
register(
    Method(
        name="compacter++",
        summary="bottlenecks of Kronecker products, after the feed-forward block only",
        source="Mahabadi et al. 2021, arXiv 2106.04647",
        equation="h <- h + U act(D h + b) + c, D and U each sum_i A_i kron (s_i t_i^T), A_i (n, n) common to all",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; n^3 numbers in all and 2 (d + w) + d + w a layer",
        configure=lambda config, task, base: _configure("compacter++", config, task, base),
        meaning=_MEANING,
        parts={"adapter": CompactAdapter},
        Options=CompacterOptions,
        kind="adapter",
        merges=False,
    )
)
