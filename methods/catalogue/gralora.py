"""GraLoRA: a weight is cut into k x k blocks, each with a low-rank change of its own."""

from __future__ import annotations

from peft import GraloraConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class GraLoraOptions(MethodOptions):
    gralora_k: int = Field(2, ge=1, description="blocks k along inputs and outputs; divides both, and method.rank")
    hybrid_r: int = Field(0, ge=0, description="further rank of one change of the whole weight")


register(
    Method(
        name="gralora",
        summary="a LoRA of rank r / k for each of k x k blocks of a weight",
        source="Jung et al. 2025, arXiv 2505.20355",
        configure=lambda config, task, base: on_layers(
            GraloraConfig,
            config,
            task,
            base,
            conv1d=True,
            r=config.rank,
            alpha=config.alpha,
            gralora_dropout=config.dropout,
        ),
        meaning=meaning_by((".gralora_", "factor", "product")),
        Options=GraLoraOptions,
        uses_rank=True,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W_ij = W0_ij + (alpha / r) B_ij A_ij for each of k x k blocks",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; r (m + n) numbers a layer",
    )
)
