"""The mix-and-match adapter: a short prefix in every attention, and a wide parallel adapter."""

from __future__ import annotations

from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import layers_of
from ..bottleneck import Activation, BottleneckOptions
from ..grafts import GraftConfig, graft_config
from ..prefixed import PrefixPart, takes_prefix
from ..registry import Method, meaning_by, register
from .parallel_adapter import PARTS, beside_ffn


class MixOptions(BottleneckOptions):
    """Of the parallel adapter; the prefix has ``method.virtual_tokens``."""

    width: int = Field(512, ge=1, description="dimensions of the bottleneck")
    activation: Activation = Field("relu", description="nonlinearity of the bottleneck")
    scale: float = Field(4.0, gt=0, description="factor of what the adapter adds")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        for attention in layer.attentions:
            if not takes_prefix(base.model.get_submodule(attention.module)):
                raise UserError(f"no prefix fits {type(base.model).__name__}: choose parallel-adapter")
            places[attention.module] = "prefix"
        places |= beside_ffn(layer)
    return graft_config("mam", places, config, task, base)


register(
    Method(
        name="mam",
        summary="a prefix in every attention and a scaled bottleneck beside every feed-forward block",
        source="He et al. 2022, arXiv 2110.04366",
        equation="attention over [P_k; K], [P_v; V], and F(x) + s (U relu(D x + b) + c), F the feed-forward block",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 2 p d + 2 d w + d + w numbers a layer; P is trained as it is",
        configure=_configure,
        meaning=meaning_by((".prefix.", "prefix", "nonlinear"), (".bottleneck.", "adapter", "nonlinear")),
        parts={"prefix": PrefixPart, **PARTS},
        Options=MixOptions,
        accepts=frozenset({"virtual_tokens"}),
        kind="hybrid",
        merges=False,
        contract={
            "settings": {"options": {"width": 8}},
            "unfit": dict.fromkeys(("t5", "vit"), "choose parallel-adapter"),
        },
    )
)
