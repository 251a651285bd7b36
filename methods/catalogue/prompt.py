"""Prompt tuning: trained embeddings before the text, at the input only."""

from __future__ import annotations

from peft import PromptTuningConfig

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, register
from .prefix import require_text, virtual_token_meaning


def require_prompt(method: str, task: Task, base: BaseModel) -> None:
    """Raise :class:`UserError` unless virtual tokens can stand before the embeddings of a text in this model."""
    require_text(method, task, base)
    if "score" in base.head:
        # Decoder-only classifiers find a text's last token by its id; a prompt replaces the ids by embeddings, and the
        # model then reads the padding: the answer for one text would hang on the length of the others in its batch.
        raise UserError(f"{method} does not fit {type(base.model).__name__}: choose prefix or lora")


def prompt_config(config: MethodConfig, task: Task, base: BaseModel) -> PromptTuningConfig:
    require_prompt("prompt tuning", task, base)
    return PromptTuningConfig(
        task_type=task.peft_type,
        num_virtual_tokens=config.virtual_tokens,
        modules_to_save=list(base.head) or None,
    )


register(
    Method(
        name="prompt",
        summary="virtual token embeddings before the text",
        source="Lester et al. 2021, arXiv 2104.08691",
        configure=prompt_config,
        meaning=virtual_token_meaning,
        equation="[P; E x], p trained embeddings before the text's",
        federates="averaged position by position; the mean is not the mean of the functions",
        privacy="exact clipping; p d numbers",
        kind="prompt",
        merges=False,
        contract={
            "unfit": {
                "t5": "choose lora",
                "vit": "choose lora",
                "gpt2/sequence-classification": "choose prefix",
                "llama/sequence-classification": "choose prefix",
            }
        },
    )
)
