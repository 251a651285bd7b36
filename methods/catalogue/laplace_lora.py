"""Laplace-LoRA: trained as LoRA is; afterwards a Laplace approximation over its factors calibrates what it predicts."""

from __future__ import annotations

from ..registry import Method, register
from .lora import LORA_ACCEPTS, lora_config, lora_meaning, set_basis

register(
    Method(
        name="laplace-lora",
        summary="lora whose predictions `fedgraft methods laplace` calibrates afterwards, by public records",
        source="Yang et al. 2024, arXiv 2308.13111",
        configure=lora_config,
        meaning=lora_meaning,
        uses_rank=True,
        build=set_basis,
        accepts=LORA_ACCEPTS | {"init"},
        equation="W = W0 + (alpha / r) B A; then f(x) ~ N(f(x), J (F + lambda)^-1 J^T), F = G kron G' by factor",
        federates="as lora: averaged factor by factor, which is not the mean of the products",
        privacy="exact clipping, as lora; F tells of its records, so it is made of public ones alone",
    )
)
