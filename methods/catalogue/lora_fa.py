"""LoRA-FA and L-LoRA: LoRA whose A stays as it was drawn.

L-LoRA puts in the place of an update s B A x its linearisation where training starts, at (A_0, 0):
s (B_0 A_0 + B_0 (A - A_0) + (B - B_0) A_0) x with B_0 = 0, of which s B A_0 x is left. So it trains no A either, and
merging is exactly linear, which is what it is for.
"""

from __future__ import annotations

from dataclasses import replace

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..registry import Method, meaning_by, register
from ..wrapping import layers_in
from .lora import LORA_ACCEPTS, lora_config, set_basis


def _freeze(model: PeftModel) -> None:
    for layer in layers_in(model, LoraLayer):
        layer.lora_A.requires_grad_(False)


_LORA_FA = register(
    Method(
        name="lora-fa",
        summary="LoRA with A frozen as it was drawn: B alone trains",
        source="Zhang et al. 2023, arXiv 2308.03303",
        configure=lora_config,
        build=set_basis,
        prepare=_freeze,
        frozen=lambda name: ".lora_A." in name,
        meaning=meaning_by((".lora_A.", "lora_A", "nonlinear"), (".lora_B.", "lora_B", "linear")),
        uses_rank=True,
        accepts=LORA_ACCEPTS | {"init"},
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) B A, A (r, n) frozen",
        federates="averages exactly; A crosses once",
        privacy="exact clipping; r m numbers a layer, and its noise is multiplied by nothing that is noised",
    )
)
register(
    replace(
        _LORA_FA,
        name="l-lora",
        summary="LoRA linearised where training starts, so that merging is exactly linear",
        source="Tang et al. 2024, arXiv 2310.04742",
        equation="y = f(x; A_0, 0) + J(x; A_0, 0) (A - A_0, B) = W0 x + (alpha / r) B A_0 x",
    )
)
