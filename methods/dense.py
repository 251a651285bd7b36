"""Changes of whole weight matrices: what methods that touch a model's own weights train beside the frozen ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .anatomy import dense_weight, is_turned, shape_of
from .grafts import Part, Setting


class WeightChange(Part):
    """y + dW x on a linear layer, dW (m, n) from :meth:`change`: subclass it for what dW is made of."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.inputs, self.outputs = shape_of(base)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """dW (m, n) for the frozen weight (m, n)."""
        raise NotImplementedError

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        change = self.change(upright(base))
        return y + F.linear(x.to(change.dtype), change).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        change = self.change(upright(base))
        return {"weight": dense_weight(base) + (change.T if is_turned(base) else change)}


class FreeChange(Part):
    """y + dW x + db on a linear layer, every number of dW (m, n) and db (m) free, from zero."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        n, m = shape_of(base)
        self.free = nn.Linear(n, m, bias=getattr(base, "bias", None) is not None)
        for parameter in self.free.parameters():
            nn.init.zeros_(parameter)

    def forward(self, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(x, *args, **kwargs)
        return y + self.free(x.to(self.free.weight.dtype)).to(y.dtype)

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        change: Any = self.free.weight
        found = {"weight": dense_weight(base) + (change.T if is_turned(base) else change)}
        if self.free.bias is not None:
            bias: Any = base.bias
            found["bias"] = bias + self.free.bias
        return found


def upright(base: nn.Module) -> torch.Tensor:
    """The frozen weight as (outputs, inputs)."""
    weight = dense_weight(base).detach()
    return weight.T if is_turned(base) else weight
