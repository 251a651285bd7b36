"""LoRA-FA: LoRA whose A stays as it was drawn."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..registry import Method, meaning_by, register
from ..wrapping import layers_in
from .lora import LORA_ACCEPTS, lora_config, set_basis


def _freeze(model: PeftModel) -> None:
    for layer in layers_in(model, LoraLayer):
        layer.lora_A.requires_grad_(False)


register(
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
