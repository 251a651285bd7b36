"""Attention fusion: each token's state becomes a mixture of what all layers of a frozen model say of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..ladder import run_frozen, stack_of, with_last
from ..registry import Method, meaning_by, register


class LayerMixture(Part):
    """out_i = LN(sum_j a_ij h_ij), a_ij = softmax_j(q . h_ij / sqrt(d)), h_ij what layer j says of token i.

    No gradient goes through the layers. The form of the scores is inferred: query and norm are 3 d numbers, which is
    what the paper counts; its own may differ. The query starts at zero, with the mean of the layers.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        width = hidden_width(setting.model)
        self.query = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result, states, _ = run_frozen(base, args, kwargs)
        layers = torch.stack(states[1:], dim=2).to(self.query.dtype)
        scores = (layers * self.query).sum(-1) / layers.shape[-1] ** 0.5
        mixed = (layers * torch.softmax(scores, dim=-1)[..., None]).sum(2)
        return with_last(result, self.norm(mixed).to(states[0].dtype))


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {stack_of(base.model, "attention-fusion", "choose houlsby"): "mixture"}
    return graft_config("attention-fusion", places, config, task, base)


register(
    Method(
        name="attention-fusion",
        summary="a trained mixture of the states of all layers: no gradient and no memory in the frozen model",
        source="Cao et al. 2022, Findings of NAACL, doi 10.18653/v1/2022.findings-naacl.64",
        equation="out_i = LN(sum_j a_ij h_ij), a_ij = softmax_j(q . h_ij / sqrt(d)) over the layers j",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 3 d numbers in all, among the fewest of the catalogue",
        configure=_configure,
        meaning=meaning_by((".query", "query", "nonlinear"), (".norm.", "norm", "nonlinear")),
        parts={"mixture": LayerMixture},
        kind="other additive",
        merges=False,
        contract={"unfit": {"t5": "choose houlsby"}},
    )
)
