"""GLoRA: weights and biases scaled, shifted and prompted by trained supports."""

from __future__ import annotations

from typing import Literal

from peft import GloraConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import on_layers


class GLoraOptions(MethodOptions):
    config_A_B: Literal["lora", "vector", "constant", "none"] = Field("lora", description="form of A and B")
    config_C: Literal["lora", "vector", "none"] = Field("lora", description="form of C")
    config_D_E: Literal["vector", "constant", "none"] = Field("constant", description="form of D and E")


register(
    Method(
        name="glora",
        summary="W0 + W0 A + B beside b0 + b0 D + E + W0 C, each low-rank, a vector or a number",
        source="Chavan et al. 2023, arXiv 2306.07967",
        configure=lambda config, task, base: on_layers(GloraConfig, config, task, base, r=config.rank),
        meaning=meaning_by((".glora_", "support", "product")),
        Options=GLoraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=frozenset({"target_modules"}),
        options={"common_rank": True},
        equation="y = (W0 + W0 A + B) x + W0 C + D b0 + E + b0",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; 2 r (m + n) + r (n + 1) + 2 numbers a layer",
        # D scales the biases of the base model, which are zero in a tiny one.
        contract={"unfit": {"gpt2": "choose lora"}, "inert": ("glora_D.",)},
    )
)
