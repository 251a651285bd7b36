"""VB-LoRA: the factors of all layers are mixed from one bank of vectors."""

from __future__ import annotations

from peft import VBLoRAConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers


class VBLoRAOptions(MethodOptions):
    num_vectors: int = Field(256, ge=2, description="vectors h of the bank")
    vector_length: int = Field(128, ge=1, description="their length b; divides inputs and outputs of every layer")
    topk: int = Field(2, ge=1, description="vectors k that are mixed in one place")


register(
    Method(
        name="vblora",
        summary="LoRA factors mixed of the k best vectors of a common bank",
        source="Li et al. 2024, arXiv 2405.15179",
        configure=lambda config, task, base: on_layers(
            VBLoRAConfig, config, task, base, conv1d=True, r=config.rank, vblora_dropout=config.dropout
        ),
        meaning=meaning_by((".vblora_logits_", "logits", "nonlinear"), ("vblora_vector_bank.", "bank", "product")),
        Options=VBLoRAOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS | {"dropout"},
        options={"common_rank": True},
        equation="W = W0 + B A, each length-b piece of A and B a softmax over its top k of h vectors",
        federates="averaged tensor by tensor; sites that choose other vectors are far from the mean",
        privacy="exact clipping; h b numbers, and h r (m + n) / b a layer",
        contract={"settings": {"rank": 2, "options": {"num_vectors": 16, "vector_length": 8}}},
    )
)
