"""PSOFT: a rotation within the principal subspace of a weight."""

from __future__ import annotations

from peft import PsoftConfig
from peft.tuners.psoft import PsoftLayer
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, computed_bases, layers_in, on_layers


class PsoftOptions(MethodOptions):
    psoft_orth: bool = Field(True, description="R is a rotation; false: any matrix")
    psoft_mag_a: bool = Field(True, description="trained scales before the rotation")
    psoft_mag_b: bool = Field(True, description="trained scales behind it")


register(
    Method(
        name="psoft",
        summary="the r principal directions of a weight, turned among themselves and scaled",
        source="Wu et al. 2026, ICLR, openreview FSHrinMArK",
        # PEFT divides the singular values by alpha / r, and multiplies by it: alpha = r leaves rounding out.
        configure=lambda config, task, base: on_layers(
            PsoftConfig, config, task, base, r=config.rank, psoft_alpha=config.rank, psoft_dropout=config.dropout
        ),
        meaning=meaning_by((".psoft_R.", "rotation", "nonlinear")),
        attached=computed_bases(
            lambda model: (layer._psoft_A_cache["default"] for layer in layers_in(model, PsoftLayer))
        ),
        Options=PsoftOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + B (diag(b) R diag(a) - 1) A, B A = SVD_r(W0), R = (I + Q)(I - Q)^-1 (r, r)",
        federates="averaged in the skew-symmetric Q; each site computes the frozen directions, and must find the same",
        privacy="exact clipping; r (r - 1) / 2 + 2 r numbers a layer",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
