"""The bottleneck of adapters: down to a few dimensions, a nonlinearity, and up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from .anatomy import hidden_width
from .grafts import Setting
from .registry import MethodOptions

#: The nonlinearities that an adapter's options may name.
Activation = Literal["relu", "gelu", "silu", "tanh", "linear"]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class BottleneckOptions(MethodOptions):
    """``width``: of the bottleneck; ``activation``: the nonlinearity in it; ``spread``: of its first weights."""

    width: int = Field(64, ge=1, description="dimensions of the bottleneck")
    activation: Activation = Field("gelu", description="nonlinearity of the bottleneck")
    spread: float = Field(1e-2, gt=0, description="standard deviation of the first weights of the way down")


class Bottleneck(nn.Module):
    """U act(D x + b) + c with D (w, d), U (d, w): D starts small, U and c at zero, so that nothing changes at first."""

    def __init__(self, width: int, inner: int, activation: Activation, spread: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]
        nn.init.normal_(self.down.weight, std=spread)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """As wide as the hidden states of the model, with the method's options."""
        options = setting.options
        return cls(hidden_width(setting.model), options.width, options.activation, options.spread)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.activation(self.down(x.to(self.down.weight.dtype)))
        return self.up(inner).to(x.dtype)
