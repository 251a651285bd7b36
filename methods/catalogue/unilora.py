"""Uni-LoRA: every number of every LoRA factor is one of d trained ones."""

from __future__ import annotations

from peft import UniLoraConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class UniLoraOptions(MethodOptions):
    theta_d_length: int = Field(256, ge=1, description="trained numbers d in all")
    proj_seed: int = Field(42, ge=0, description="seed of which number stands where, equal at all sites")


register(
    Method(
        name="unilora",
        summary="the factors of all layers are projected from one vector of d numbers",
        source="Li et al. 2025, arXiv 2506.00799",
        configure=lambda config, task, base: on_layers(
            UniLoraConfig, config, task, base, conv1d=True, r=config.rank, unilora_dropout=config.dropout
        ),
        meaning=meaning_by(("unilora_theta_d.", "vector", "product")),
        Options=UniLoraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + B A, [all A; all B] = P t, P isometric with one entry a row, t (d)",
        federates="t is averaged, of which the products are quadratic; P never crosses",
        privacy="exact clipping; d numbers in all",
    )
)
