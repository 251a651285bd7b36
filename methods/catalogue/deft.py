"""DEFT and PaRa: a subspace of a weight's outputs is taken out, and in DEFT filled anew."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import DeftConfig, PeftModel
from peft.tuners.deft import DeftLinear
from peft.utils import transpose
from pydantic import Field

from ...core.config import MethodConfig
from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, layers_in, on_layers


class DeftOptions(MethodOptions):
    decomposition_method: Literal["relu", "qr"] = Field(
        "relu", description="the projection: P relu(P)^T, or Q Q^T with Q R = P"
    )


class AnyPrecision(DeftLinear):
    """PEFT's layer in the precision of its inputs, where PEFT's goes through single precision."""

    def _project(self, P: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self.deft_decomposition[adapter_name] == "qr":
            q, _ = torch.linalg.qr(P)
            return q, q
        return P, torch.relu(P)

    def _merge_factor(self, adapter_name: str) -> torch.Tensor:
        base: Any = self.get_base_layer()
        _, right = self._project(self.deft_P[adapter_name], adapter_name)
        found: torch.Tensor = right.T @ transpose(base.weight, self.fan_in_fan_out).to(right)
        return found

    def _delta_from_factor(self, adapter_name: str, factor: torch.Tensor) -> torch.Tensor:
        left, _ = self._project(self.deft_P[adapter_name], adapter_name)
        filled = 0.0 if self.deft_para[adapter_name] else self.deft_R[adapter_name]
        base: Any = self.get_base_layer()
        change: torch.Tensor = transpose(left @ (filled - factor.to(left)), self.fan_in_fan_out)
        return change.to(base.weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.deft_P]
        if self.disable_adapters or self.merged or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        left, right = self._project(self.deft_P[active[0]], active[0])
        base: Any = self.get_base_layer()
        inner = -((y if base.bias is None else y - base.bias) @ right)
        if not self.deft_para[active[0]]:
            inner = inner + F.linear(self.deft_dropout[active[0]](x), self.deft_R[active[0]])
        return y + F.linear(inner, left)


def _build(model: PeftModel, config: MethodConfig) -> None:
    for layer in layers_in(model, DeftLinear):
        layer.__class__ = AnyPrecision


register(
    Method(
        name="deft",
        summary="a subspace of a weight's outputs, projected out and filled anew",
        source="PEFT's DEFT (decompositional efficient fine-tuning), 0.21",
        configure=lambda config, task, base: on_layers(
            DeftConfig, config, task, base, conv1d=True, r=config.rank, deft_dropout=config.dropout
        ),
        build=_build,
        meaning=meaning_by((".deft_P.", "factor", "nonlinear"), (".deft_R.", "factor", "product")),
        Options=DeftOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = (I - P relu(P)^T) W0 + P R, at first R = relu(P)^T W0 and so W = W0",
        federates="averaged factor by factor; the mean is not the mean of the projections",
        privacy="exact clipping; r (m + n) numbers a layer",
    )
)
register(
    Method(
        name="para",
        summary="a subspace of a weight's outputs, projected out",
        source="Chen et al. 2024, arXiv 2406.05641",
        configure=lambda config, task, base: on_layers(
            DeftConfig,
            config,
            task,
            base,
            conv1d=True,
            options=False,
            r=config.rank,
            para=True,
            decomposition_method="qr",
        ),
        build=_build,
        meaning=meaning_by((".deft_P.", "factor", "nonlinear")),
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = (I - Q Q^T) W0, Q R = P (m, r); not W0 at first: P is drawn, and has no zero",
        federates="averaged in P; the mean is not the mean of the projections",
        privacy="exact clipping; r m numbers a layer",
        contract={"settings": {"rank": 2}},
    )
)
