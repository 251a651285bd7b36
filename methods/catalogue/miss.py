"""MiSS and BAT: one small block, repeated along a weight."""

from __future__ import annotations

from peft import MissConfig

from ..registry import Method, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers

register(
    Method(
        name="miss",
        summary="dW repeats one row of r numbers an output along the inputs",
        source="Kang and Yin 2024, arXiv 2409.15371",
        configure=lambda config, task, base: on_layers(
            MissConfig, config, task, base, r=config.rank, miss_dropout=config.dropout
        ),
        meaning=meaning_by((".miss_block.", "shard", "linear")),
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + [D D .. D], D (m, r) n / r times",
        federates="averages exactly",
        privacy="exact clipping; r m numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
register(
    Method(
        name="bat",
        summary="blocks of a weight, each multiplied by one trained block and shifted by it",
        source="Kang and Yin 2024, arXiv 2409.15371",
        configure=lambda config, task, base: on_layers(
            MissConfig, config, task, base, r=config.rank, miss_dropout=config.dropout, init_weights="bat"
        ),
        meaning=meaning_by((".miss_block.", "shard", "linear")),
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W_ij = W0_ij + W0_ij D_j + D_j, blocks (r, r); r divides inputs and outputs",
        federates="averages exactly",
        privacy="exact clipping; r m numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
