"""DeLoRA: low-rank updates of bounded norm, whose strength trains apart from their direction."""

from __future__ import annotations

from peft import DeloraConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class DeLoraOptions(MethodOptions):
    delora_lambda: float = Field(15.0, gt=0, description="first value of the bound on the norm of dW")


register(
    Method(
        name="delora",
        summary="normed rank-one directions times one trained strength",
        source="Bini et al. 2025, arXiv 2503.18225",
        configure=lambda config, task, base: on_layers(DeloraConfig, config, task, base, r=config.rank),
        meaning=meaning_by((".delora_", "factor", "nonlinear")),
        Options=DeLoraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 + (lambda |W0| / r) sum_i b_i a_i / (|b_i| |a_i|), |W0| by column",
        federates="averaged factor by factor; neither direction nor strength averages exactly",
        privacy="exact clipping; r (m + n) + 1 numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
