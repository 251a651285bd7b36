"""(IA)3: learned vectors that scale keys, values and the inner activations of the feed-forward block."""

from __future__ import annotations

from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
)

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, register, require_targets

# Families whose module names PEFT's own table does not follow, or lacks.
_TARGETS = {"vit": (["k_proj", "v_proj", "fc2"], ["fc2"])}


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> IA3Config:
    family = str(getattr(base.model.config, "model_type", ""))
    if config.target_modules:
        targets = list(config.target_modules)
        # The last one named is the feed-forward output, whose input is scaled.
        feedforward = targets[-1:]
    elif family in _TARGETS:
        targets, feedforward = _TARGETS[family]
    elif family in TARGETS:
        targets, feedforward = list(TARGETS[family]), list(FEEDFORWARD[family])
    else:
        raise UserError(f"(IA)3 knows no targets in a {family} model; name them in method.target_modules")
    return IA3Config(
        task_type=task.peft_type or None,
        target_modules=require_targets(base.model, targets),
        feedforward_modules=feedforward,
        modules_to_save=list(base.head) or None,
    )


def _meaning(name: str) -> tuple[str, Averaging]:
    return ("scale", "linear") if ".ia3_l." in name else ("head", "nonlinear")


register(
    Method(
        name="ia3",
        summary="vectors that scale keys, values and feed-forward activations",
        source="Liu et al. 2022, arXiv 2205.05638",
        configure=_configure,
        meaning=_meaning,
        accepts=frozenset({"target_modules"}),
        equation="k <- l_k k, v <- l_v v, feed-forward: W (l_ff act(.))",
        federates="averages exactly within a layer",
        privacy="exact clipping; 2 d + d_ff numbers a layer",
        kind="other additive",
    )
)
