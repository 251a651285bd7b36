"""RandLoRA: a full-rank change as a sum of random products with trained scales."""

from __future__ import annotations

from peft import RandLoraConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class RandLoraOptions(MethodOptions):
    projection_prng_key: int = Field(0, ge=0, description="seed of the common factors, equal at all sites")


register(
    Method(
        name="randlora",
        summary="a full-rank sum of random low-rank products with trained diagonals",
        source="Albert et al. 2025, arXiv 2502.00987",
        configure=lambda config, task, base: on_layers(
            RandLoraConfig,
            config,
            task,
            base,
            conv1d=True,
            r=config.rank,
            randlora_alpha=config.alpha,
            randlora_dropout=config.dropout,
        ),
        meaning=meaning_by((".randlora_lambda.", "scale", "product"), (".randlora_gamma.", "scale", "product")),
        Options=RandLoraOptions,
        uses_rank=True,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) sum_i B_i diag(l_i) A diag(g_i), B_i and A random, min(m, n) / r terms",
        federates="averaged vector by vector, which is not the mean of the products; A and B never cross",
        privacy="exact clipping; min(m, n) (1 + min(m, n) / r) numbers a layer",
    )
)
