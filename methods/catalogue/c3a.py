"""C3A: the change of a weight is a matrix of circulant blocks."""

from __future__ import annotations

from peft import C3AConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class C3AOptions(MethodOptions):
    block_size: int = Field(256, ge=1, description="width b of a block; divides inputs and outputs")


register(
    Method(
        name="c3a",
        summary="dW of circulant blocks, each one trained vector",
        source="Chen et al. 2024, arXiv 2407.19342",
        configure=lambda config, task, base: on_layers(C3AConfig, config, task, base, init_weights=True),
        meaning=meaning_by((".c3a_kernel.", "kernel", "linear")),
        Options=C3AOptions,
        accepts=ON_LAYERS,
        equation="W = W0 + [circ(w_ij)], blocks (b, b)",
        federates="averages exactly",
        privacy="exact clipping, example by example (slow); m n / b numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"block_size": 8}}},
    )
)
