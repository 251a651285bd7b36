"""VeRA and PVeRA: vectors that scale the rows of random factors, which every layer and every site has in common."""

from __future__ import annotations

from typing import Any

from peft import PveraConfig, VeraConfig
from peft.tuners.pvera import PveraLayer
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..steps import Steps
from ..wrapping import ON_LAYERS, on_layers


class VeraOptions(MethodOptions):
    projection_prng_key: int = Field(0, ge=0, description="seed of the common factors, equal at all sites")
    d_initial: float = Field(0.1, description="first value of d")


class _Sampling(Steps):
    """PVeRA draws its inner activations while it trains, and computes with their means after."""

    def before(self, step: int) -> None:
        self._sample(True)

    def close(self) -> None:
        self._sample(False)

    def _sample(self, on: bool) -> None:
        for layer in self.adapter.model.modules():
            if isinstance(layer, PveraLayer):
                held: Any = layer
                held.sample_at_inference["default"] = on


register(
    Method(
        name="vera",
        summary="dW = diag(b) B diag(d) A, A and B random and common to all layers",
        source="Kopiczko et al. 2023, arXiv 2310.11454",
        configure=lambda config, task, base: on_layers(
            VeraConfig, config, task, base, conv1d=True, r=config.rank, vera_dropout=config.dropout
        ),
        meaning=meaning_by((".vera_lambda_", "scale", "product")),
        Options=VeraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + diag(b) B diag(d) A, b (m) and d (r); the paper takes r = 256 or more",
        federates="averaged vector by vector, which is not the mean of the products; A and B never cross",
        privacy="exact clipping; m + r numbers a layer",
    )
)
register(
    Method(
        name="pvera",
        summary="VeRA whose inner activations are drawn while it trains, with trained mean and variance",
        source="Fillioux et al. 2025, arXiv 2512.07703",
        configure=lambda config, task, base: on_layers(
            PveraConfig, config, task, base, conv1d=True, r=config.rank, pvera_dropout=config.dropout
        ),
        meaning=meaning_by((".pvera_lambda_", "scale", "product")),
        steps=_Sampling,
        Options=VeraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="y = W0 x + diag(b) B z, z ~ N(mu, exp(v)), [mu; v] = diag(d) A x; merged with z = mu",
        federates="averaged vector by vector, which is not the mean of the products; A and B never cross",
        privacy="exact clipping; m + 2 r numbers a layer; what is drawn is drawn for each record by itself",
        contract={"lr": 3e-2},
    )
)
