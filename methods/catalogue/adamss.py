"""AdaMSS: the outputs of a layer are clustered, and each cluster has a low-rank change of its own."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from peft import AdamssConfig, PeftModel
from peft.tuners.adamss import AdamssLayer, Linear
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import ON_LAYERS, computed_bases, layers_in, on_layers


class AdamssOptions(MethodOptions):
    num_subspaces: int = Field(5, ge=1, description="clusters k of a layer's outputs")
    subspace_rank: int = Field(1, ge=1, description="rank of each cluster's change")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> AdamssConfig:
    if find_spec("sklearn") is None:
        raise UserError("method adamss clusters with scikit-learn: pip install 'fedgraft[merge]', or choose lora")
    return on_layers(AdamssConfig, config, task, base, weights=True, r=config.rank)


class AnyPrecision(Linear):
    """PEFT's layer, which keeps to the precision that it was made in."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        weight: Any = self.get_base_layer().weight
        found: torch.dtype = weight.dtype
        return found


def _build(model: PeftModel, config: MethodConfig) -> None:
    for layer in layers_in(model, Linear):
        layer.__class__ = AnyPrecision


def _bases(model: nn.Module) -> Iterator[torch.Tensor]:
    for layer in layers_in(model, AdamssLayer):
        yield layer.adamss_newB["default"]
        yield layer.scatter_index["default"]


register(
    Method(
        name="adamss",
        summary="low-rank changes of clusters of outputs, within the principal subspace of a weight",
        source="Zheng et al. 2025, NeurIPS (AdaMSS)",
        configure=_configure,
        build=_build,
        meaning=meaning_by((".adamss_", "factor", "product")),
        attached=computed_bases(_bases),
        Options=AdamssOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=ON_LAYERS,
        options={"common_rank": True},
        equation="W = W0 + sum_k P_k B_k A_k V^T, V the r principal directions, P_k the rows of cluster k",
        federates="averaged factor by factor, not the mean of the products; each site finds V and the clusters",
        privacy="exact clipping; k s r + s m numbers a layer at rank s of a cluster",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"rank": 8}},
    )
)
