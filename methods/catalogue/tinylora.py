"""TinyLoRA: a handful of trained numbers beside the principal directions of a weight."""

from __future__ import annotations

from peft import TinyLoraConfig
from peft.tuners.tinylora import TinyLoraLayer
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, computed_bases, layers_in, on_layers


class TinyLoraOptions(MethodOptions):
    u: int = Field(64, ge=1, description="trained numbers v of a layer, or of all layers that share them")
    weight_tying: float = Field(0.0, ge=0, le=1, description="0: each layer has its own v; 1: all layers share one")
    projection_seed: int = Field(42, ge=0, description="seed of the frozen projections, equal at all sites")


register(
    Method(
        name="tinylora",
        summary="dW = U S (sum_i v_i P_i) V^T: u numbers beside the r principal directions of W0",
        source="Morris et al. 2026, arXiv 2602.04118",
        configure=lambda config, task, base: on_layers(
            TinyLoraConfig, config, task, base, conv1d=True, r=config.rank, tinylora_dropout=config.dropout
        ),
        meaning=meaning_by(("tinylora_v.", "core", "linear")),
        attached=computed_bases(
            lambda model: (layer.tinylora_A["default"] for layer in layers_in(model, TinyLoraLayer))
        ),
        Options=TinyLoraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + U S (sum_i v_i P_i) V^T, SVD_r of W0 and random P_i (r, r) frozen",
        federates="averages exactly; each site computes the frozen directions, and must find the same",
        privacy="exact clipping; u numbers a layer, or u in all",
        contract={"settings": {"rank": 2, "options": {"u": 8}}},
    )
)
