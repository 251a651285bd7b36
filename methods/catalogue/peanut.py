"""PEANuT: a small network of the frozen weight makes the change of it."""

from __future__ import annotations

from typing import Literal

from peft import PeanutConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class PeanutOptions(MethodOptions):
    depth: int = Field(0, ge=0, description="further pairs of inner layers")
    act_fn: Literal["relu", "gelu", "silu", "tanh", "sigmoid"] = Field("relu", description="activation")
    scaling: float = Field(1.0, gt=0, description="factor of dW")


register(
    Method(
        name="peanut",
        summary="dW = s act(W0 A) B: a change that knows the weight",
        source="Zhong et al. 2024, arXiv 2410.01870",
        configure=lambda config, task, base: on_layers(PeanutConfig, config, task, base, r=config.rank),
        meaning=meaning_by((".peanut_", "factor", "nonlinear")),
        Options=PeanutOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 + s f(W0), f a network with weights A (m, r) and B (r, m)",
        federates="averaged factor by factor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 r m numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
