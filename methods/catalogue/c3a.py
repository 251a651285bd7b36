"""C3A: the change of a weight is a matrix of circulant blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import C3AConfig, PeftModel
from peft.tuners.c3a import C3ALinear
from pydantic import Field

from ...core.config import MethodConfig
from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class C3AOptions(MethodOptions):
    block_size: int = Field(128, ge=1, description="width b of a block; divides inputs and outputs")


class CirculantLinear(C3ALinear):
    """PEFT's layer as one product with its circulant blocks.

    PEFT goes through a Fourier transform of single precision, from which no gradients of single examples come but one
    by one.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.c3a_kernel]
        if self.disable_adapters or self.merged or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return y + F.linear(x, self._change(active[0]).to(x.dtype)).to(y.dtype)

    def _change(self, adapter: str) -> torch.Tensor:
        """dW (m, n): entry (i, j) of a block is number (j - i) mod b of its kernel, over n."""
        kernel = self.c3a_kernel[adapter]
        rows, columns, size = kernel.shape
        at = torch.arange(size, device=kernel.device)
        blocks = kernel[:, :, (at - at[:, None]) % size]
        return blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size) / (columns * size)


def _build(model: PeftModel, config: MethodConfig) -> None:
    for layer in model.modules():
        if type(layer) is C3ALinear:
            layer.__class__ = CirculantLinear


register(
    Method(
        name="c3a",
        summary="dW of circulant blocks, each one trained vector",
        source="Chen et al. 2024, arXiv 2407.19342",
        configure=lambda config, task, base: on_layers(C3AConfig, config, task, base, init_weights=True),
        build=_build,
        meaning=meaning_by((".c3a_kernel.", "kernel", "linear")),
        Options=C3AOptions,
        accepts=ON_LAYERS,
        equation="W = W0 + [circ(w_ij)] / n, blocks (b, b)",
        federates="averages exactly",
        privacy="exact clipping; m n / b numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"block_size": 8}}},
    )
)
