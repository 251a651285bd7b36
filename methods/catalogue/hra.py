"""HRA: the inputs of frozen layers are reflected by r trained Householder reflections."""

from __future__ import annotations

from peft import HRAConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class HRAOptions(MethodOptions):
    apply_GS: bool = Field(False, description="make the reflections' normals orthogonal, by Gram and Schmidt")


register(
    Method(
        name="hra",
        summary="r Householder reflections of the inputs of frozen layers",
        source="Yuan et al. 2024, arXiv 2405.17484",
        configure=lambda config, task, base: on_layers(HRAConfig, config, task, base, r=config.rank),
        meaning=meaning_by((".hra_u.", "reflection", "nonlinear")),
        Options=HRAOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 H_1 .. H_r, H_i = I - 2 u_i u_i^T / |u_i|^2; an even r starts at the identity",
        federates="averaged normal by normal; the mean is not the mean of the rotations",
        privacy="exact clipping; r n numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
