"""OFT and BOFT: the inputs of frozen layers are turned by block-diagonal or butterfly rotations."""

from __future__ import annotations

from peft import BOFTConfig, OFTConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class OFTOptions(MethodOptions):
    oft_block_size: int = Field(32, ge=2, description="width b of a block; it divides the layer's input")
    block_share: bool = Field(False, description="one block for all")
    use_cayley_neumann: bool = Field(True, description="(I - Q)^-1 by five terms of its series (OFTv2); false: exactly")


class BOFTOptions(MethodOptions):
    boft_block_size: int = Field(4, ge=2, description="width b of a block; it divides the layer's input")
    boft_n_butterfly_factor: int = Field(1, ge=1, description="butterfly factors; several need CUDA")


def _oft_config(config: MethodConfig, task: Task, base: BaseModel) -> OFTConfig:
    return on_layers(OFTConfig, config, task, base, r=0)


register(
    Method(
        name="oft",
        summary="block-diagonal rotations of the inputs of frozen layers",
        source="Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025 (OFTv2), arXiv 2506.19847",
        configure=_oft_config,
        meaning=meaning_by((".oft_R.", "rotation", "nonlinear")),
        Options=OFTOptions,
        accepts=ON_LAYERS,
        equation="W = W0 diag(R_1 .. R_k), R_i = (I + Q_i)(I - Q_i)^-1, Q_i skew-symmetric (b, b)",
        federates="averaged in Q, where the mean of two rotations is again one, but not the mean of their effects",
        privacy="exact clipping; n (b - 1) / 2 numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"oft_block_size": 4}}},
    )
)
register(
    Method(
        name="boft",
        summary="butterfly rotations of the inputs of frozen layers, and a scale of their outputs",
        source="Liu et al. 2023, arXiv 2311.06243",
        configure=lambda config, task, base: on_layers(BOFTConfig, config, task, base),
        meaning=meaning_by((".boft_R.", "rotation", "nonlinear"), (".boft_s.", "scale", "nonlinear")),
        Options=BOFTOptions,
        accepts=ON_LAYERS,
        equation="W = diag(s) W0 R_1 .. R_k, each R a permuted block-diagonal Cayley rotation",
        federates="averaged in the skew-symmetric Q; not the mean of their effects",
        privacy="exact clipping; k n b + m numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
