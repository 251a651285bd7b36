"""Freeze-layers: the last layers of the model train whole, the others rest."""

from __future__ import annotations

from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import layers_of
from ..dense import FreeChange
from ..grafts import GraftConfig, graft_config
from ..registry import Method, MethodOptions, meaning_by, register


class FreezeLayersOptions(MethodOptions):
    """``last``: how many layers at the end of each stack train."""

    last: int = Field(1, ge=1, description="layers at the end of each stack that train; method.layers names others")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    layers = layers_of(base.model)
    last = FreezeLayersOptions.model_validate(dict(config.options)).last
    depth = {
        stack: 1 + max(layer.index for layer in layers if layer.stack == stack) for stack in {x.stack for x in layers}
    }
    if last > min(depth.values()):
        raise UserError(f"method.options.last is {last}, the model has {min(depth.values())} layers; lower it")
    chosen = [
        layer
        for layer in layers
        if (layer.index in config.layers if config.layers else layer.index >= depth[layer.stack] - last)
    ]
    places = {path: "change" for layer in chosen for path in layer.linears}
    return graft_config("freeze-layers", places, config, task, base)


register(
    Method(
        name="freeze-layers",
        summary="the linear layers of the last layers, whole",
        source="Lee et al. 2019, arXiv 1911.03090",
        equation="W = W0 + dW, b = b0 + db in the last layers, every number free",
        federates="averages exactly within a layer",
        privacy="exact clipping, but noise on every weight of the layers that train",
        configure=_configure,
        meaning=meaning_by((".free.", "weight", "linear")),
        parts={"change": FreeChange},
        accepts=frozenset({"layers"}),
        Options=FreezeLayersOptions,
        kind="partial",
        contract={"inert": tuple(f".{key}.graft.default.free.bias" for key in ("key", "k_proj"))},
    )
)
