"""FRoD: a full-rank change in a basis that layers of a kind have in common."""

from __future__ import annotations

from peft import FrodConfig
from peft.tuners.frod import FrodLayer
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, computed_bases, layers_in, on_layers


class FrodOptions(MethodOptions):
    sparse_rate: float = Field(0.01, gt=0, le=1, description="share of off-diagonal numbers that train")
    projection_prng_key: int = Field(0, ge=0, description="seed of their places, equal at all sites")


register(
    Method(
        name="frod",
        summary="W = U (diag(l) + S) V^T: a diagonal and a few other entries train in a common basis",
        source="Wang et al. 2026, AAAI, doi 10.1609/aaai.v40i31.39813",
        configure=lambda config, task, base: on_layers(
            FrodConfig, config, task, base, conv1d=True, weights=True, frod_dropout=config.dropout, progressbar=False
        ),
        meaning=meaning_by((".frod_lambda_", "core", "linear")),
        attached=computed_bases(lambda model: (layer.frod_V["default"].T for layer in layers_in(model, FrodLayer))),
        Options=FrodOptions,
        accepts=ON_LAYERS | {"dropout"},
        equation="W = U (diag(l) + S) V^T, V from the joint decomposition of all weights of a kind",
        federates="averages exactly; each site computes the frozen bases, and must find the same",
        privacy="exact clipping, example by example (slow); n + sparse_rate n^2 numbers a layer",
        kind="other reparameterised",
    )
)
