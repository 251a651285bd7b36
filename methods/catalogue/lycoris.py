"""LoHa, LoKr and KronA: changes of the weights that are Hadamard or Kronecker products."""

from __future__ import annotations

from peft import LoHaConfig, LoKrConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, on_layers

_FEDERATES = "averaged factor by factor, which is not the mean of the products"


class LoKrOptions(MethodOptions):
    decompose_both: bool = Field(False, description="the small factor is a product of two, too")
    decompose_factor: int = Field(
        -1, ge=-1, description="rows and columns of the small factor; -1: as square as can be"
    )


class KronAOptions(MethodOptions):
    decompose_factor: int = Field(
        -1, ge=-1, description="rows and columns of the small factor; -1: as square as can be"
    )


def _krona_config(config: MethodConfig, task: Task, base: BaseModel) -> LoKrConfig:
    # A rank that no layer reaches leaves both factors whole; alpha / r is then s itself.
    whole = max(max(p.shape) for p in base.model.parameters() if p.dim() == 2)
    return on_layers(LoKrConfig, config, task, base, r=whole, alpha=config.alpha * whole)


register(
    Method(
        name="loha",
        summary="dW = (alpha / r) (B1 A1) * (B2 A2), entry by entry",
        source="Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; Yeh et al. 2023 (LyCORIS), arXiv 2309.14859",
        configure=lambda config, task, base: on_layers(
            LoHaConfig, config, task, base, r=config.rank, alpha=config.alpha
        ),
        meaning=meaning_by((".hada_", "factor", "product")),
        uses_rank=True,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) (B1 A1) o (B2 A2), of rank up to r^2",
        federates=_FEDERATES,
        privacy="exact clipping; 2 r (m + n) numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
register(
    Method(
        name="lokr",
        summary="dW = (alpha / r) C kron (B A)",
        source="Yeh et al. 2023 (LyCORIS), arXiv 2309.14859",
        configure=lambda config, task, base: on_layers(
            LoKrConfig, config, task, base, r=config.rank, alpha=config.alpha
        ),
        meaning=meaning_by((".lokr_", "factor", "product")),
        Options=LoKrOptions,
        uses_rank=True,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 + (alpha / r) C kron (B A), C (f, f); W2 whole where r is half its width",
        federates=_FEDERATES,
        privacy="exact clipping; f^2 + r (m + n) / f numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"rank": 2}},
    )
)
register(
    Method(
        name="krona",
        summary="dW = alpha A kron B, both factors whole",
        source="Edalati et al. 2022, arXiv 2212.10650",
        configure=_krona_config,
        meaning=meaning_by((".lokr_", "factor", "product")),
        Options=KronAOptions,
        uses_alpha=True,
        accepts=ON_LAYERS,
        equation="W = W0 + s A kron B, A (f, g) and B (m / f, n / g); s is method.alpha",
        federates=_FEDERATES,
        privacy="exact clipping; f g + m n / (f g) numbers a layer",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"alpha": 1.0}},
    )
)
