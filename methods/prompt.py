"""Prompt tuning: trained embeddings before the text, at the input only."""

from __future__ import annotations

from peft import PromptTuningConfig

from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.tasks import Task
from .prefix import needs_text, virtual_token_meaning
from .registry import Method, register


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> PromptTuningConfig:
    needs_text(task, "prompt tuning")
    return PromptTuningConfig(task_type=task.peft_type, num_virtual_tokens=config.virtual_tokens)


register(
    Method(
        name="prompt",
        summary="virtual token embeddings before the text",
        source="Lester et al. 2021, arXiv 2104.08691",
        configure=_configure,
        meaning=virtual_token_meaning,
        dp="refused: the prompt is built once for a whole batch, so no record's gradient can be clipped",
    )
)
