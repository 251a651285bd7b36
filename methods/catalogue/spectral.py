"""FourierFT and WaveFT: the change of a weight is sparse in another basis, at places that every site draws alike."""

from __future__ import annotations

from typing import Literal

from peft import FourierFTConfig, WaveFTConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers

_FEDERATES = "averages exactly: dW is linear in the coefficients, and the places are drawn from a common seed"


class FourierFTOptions(MethodOptions):
    n_frequency: int = Field(1000, ge=1, description="coefficients k a layer")
    scaling: float = Field(150.0, gt=0, description="factor of dW")
    random_loc_seed: int = Field(777, ge=0, description="seed of their places, equal at all sites")


class WaveFTOptions(MethodOptions):
    n_frequency: int = Field(2592, ge=1, description="coefficients k a layer")
    scaling: float = Field(25.0, gt=0, description="factor of dW")
    wavelet_family: Literal["db1", "sym2", "coif1"] = Field("db1", description="the wavelet")
    random_loc_seed: int = Field(777, ge=0, description="seed of their places, equal at all sites")


register(
    Method(
        name="fourierft",
        summary="dW has k trained entries in its Fourier transform",
        source="Gao et al. 2024, arXiv 2405.03003",
        configure=lambda config, task, base: on_layers(FourierFTConfig, config, task, base, conv1d=True),
        meaning=meaning_by((".fourierft_spectrum.", "spectrum", "linear")),
        Options=FourierFTOptions,
        accepts=ON_LAYERS,
        equation="W = W0 + s Re(IDFT2(F)), F zero but at k places",
        federates=_FEDERATES,
        privacy="exact clipping; k numbers a layer",
        kind="other reparameterised",
        contract={"settings": {"options": {"n_frequency": 20}}},
    )
)
register(
    Method(
        name="waveft",
        summary="dW has k trained entries in its wavelet transform",
        source="Bilican et al. 2025, arXiv 2505.12532",
        configure=lambda config, task, base: on_layers(WaveFTConfig, config, task, base, conv1d=True),
        meaning=meaning_by((".waveft_spectrum.", "spectrum", "linear")),
        Options=WaveFTOptions,
        accepts=ON_LAYERS,
        equation="W = W0 + s IDWT2(C), C zero but at k places",
        federates=_FEDERATES,
        privacy="exact clipping; k numbers a layer",
        kind="other reparameterised",
        contract={"settings": {"options": {"n_frequency": 20}}},
    )
)
