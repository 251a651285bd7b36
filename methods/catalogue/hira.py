"""HiRA: a low-rank product that multiplies a weight entry by entry."""

from __future__ import annotations

from peft import HiraConfig

from ..registry import Method, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers

register(
    Method(
        name="hira",
        summary="dW = W0 * (B A), entry by entry, of high rank",
        source="Huang et al. 2025, ICLR, openreview TwJrTz9cRS",
        configure=lambda config, task, base: on_layers(
            HiraConfig, config, task, base, conv1d=True, r=config.rank, hira_dropout=config.dropout
        ),
        meaning=meaning_by((".hira_", "factor", "product")),
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + W0 o (B A)",
        federates="averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping; r (m + n) numbers a layer",
    )
)
