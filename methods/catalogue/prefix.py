"""Prefix tuning: trained keys and values before the text, in every attention layer."""

from __future__ import annotations

from peft import PrefixTuningConfig

from ...core.adapter import Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, register


def require_text(method: str, task: Task, base: BaseModel) -> None:
    """Raise :class:`UserError` unless virtual tokens can stand before the task's inputs in this model."""
    if not task.peft_type:
        raise UserError(f"{method} puts virtual tokens before a text; {task.name} has none: choose lora")
    if getattr(base.model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{method} does not fit {type(base.model).__name__}, which has an encoder and a decoder: choose lora"
        )


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> PrefixTuningConfig:
    require_text("prefix tuning", task, base)
    return PrefixTuningConfig(
        task_type=task.peft_type,
        num_virtual_tokens=config.virtual_tokens,
        modules_to_save=list(base.head) or None,
    )


def virtual_token_meaning(name: str) -> tuple[str, Averaging]:
    return ("prompt", "nonlinear") if name.startswith("prompt_encoder.") else ("head", "nonlinear")


register(
    Method(
        name="prefix",
        summary="virtual keys and values in every attention layer",
        source="Li and Liang 2021, arXiv 2101.00190; Liu et al. 2022 (P-tuning v2), arXiv 2110.07602",
        configure=_configure,
        meaning=virtual_token_meaning,
        equation="attention over [P_k; K], [P_v; V], p trained keys and values a layer",
        federates="averaged position by position; the mean is not the mean of the functions",
        privacy="exact clipping; 2 p d numbers a layer",
        kind="prompt",
        merges=False,
        recomputes=False,
        contract={"unfit": {"t5": "choose lora", "vit": "choose lora"}},
    )
)
