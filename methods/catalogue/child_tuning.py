"""Child-Tuning F: all weights train, but at each step only a drawn child network follows its gradient."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..dense import FreeChange
from ..grafts import GraftConfig, graft_config
from ..registry import Method, MethodOptions, meaning_by, register
from ..steps import Steps
from .masks import places_of


class ChildOptions(MethodOptions):
    """``keep``: p_F, the chance that a weight follows its gradient at a step."""

    keep: float = Field(0.3, gt=0, le=1, description="p_F: chance that a weight follows its gradient at a step")


class ChildSteps(Steps):
    """Multiplies each gradient by a Bernoulli mask, and divides by its chance (Xu et al. 2021, equation 3)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep = ChildOptions.model_validate(dict(self.config.options)).keep
        trainables = self.adapter.trainables()
        self._own = [trainables[t.name] for t in self.adapter.spec.tensors if t.role != "head" and t.name in trainables]

    def gradients(self, step: int) -> None:
        for parameter in self._own:
            if parameter.grad is not None:
                mask = torch.rand_like(parameter.grad) < self._keep
                parameter.grad = parameter.grad * mask / self._keep


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    return graft_config("child-tuning-f", places_of(config, base), config, task, base)


register(
    Method(
        name="child-tuning-f",
        summary="all linear layers, of which each step moves a drawn part",
        source="Xu et al. 2021, arXiv 2109.05687",
        equation="w <- w - eta M_t * dL/dw / p, M_t ~ Bernoulli(p) anew at each step",
        federates="averages exactly within a layer",
        privacy="exact clipping, but noise on every weight; the mask is drawn after it",
        configure=_configure,
        meaning=meaning_by((".free.", "weight", "linear")),
        parts={"change": FreeChange},
        steps=ChildSteps,
        accepts=frozenset({"target_modules"}),
        Options=ChildOptions,
        kind="partial",
        contract={"inert": tuple(f".{key}.graft.default.free.bias" for key in ("key", "k_proj"))},
    )
)
