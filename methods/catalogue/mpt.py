"""Multitask prompt tuning: a prompt that is common, times a low-rank matrix of the task's own.

A job is one task. The common prompt and the task's factors train together; the paper's other stage, in which the
prompt is distilled from several source tasks, is a matter of where the first state comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import MultitaskPromptTuningConfig, PeftModel, PromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..encoded import EncodedPrompt
from ..registry import Method, register
from .prefix import virtual_token_meaning
from .prompt import require_prompt

_ADAPTER = "default"


class OneTask(MultitaskPromptEmbedding):
    """PEFT's encoder for the only task there is, without an operation in place on what records share."""

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        own = self.prefix_task_cols[0] @ self.prefix_task_rows[0]
        common: torch.Tensor = self.embedding(indices)
        return common * own


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> MultitaskPromptTuningConfig:
    require_prompt("multitask prompt tuning", task, base)
    return MultitaskPromptTuningConfig(
        task_type=task.peft_type,
        num_virtual_tokens=config.virtual_tokens,
        num_ranks=config.rank,
        num_tasks=1,
        modules_to_save=list(base.head) or None,
    )


def _build(model: PeftModel, config: MethodConfig) -> None:
    model.prompt_encoder[_ADAPTER].__class__ = OneTask


@contextmanager
def _plain(model: PeftModel) -> Iterator[None]:
    """Within, the model is saved as plain prompt tuning, of the product."""
    own: Any = model.peft_config[_ADAPTER]
    kept = {key: value for key, value in own.to_dict().items() if key in PromptTuningConfig.__dataclass_fields__}
    model.peft_config[_ADAPTER] = PromptTuningConfig(**{**kept, "peft_type": None, "prompt_tuning_init": "RANDOM"})
    try:
        yield
    finally:
        model.peft_config[_ADAPTER] = own


register(
    Method(
        name="mpt",
        summary="a common prompt times a low-rank matrix of the task's own",
        source="Wang et al. 2023, arXiv 2303.02861",
        configure=_configure,
        meaning=virtual_token_meaning,
        build=_build,
        plain=_plain,
        attached=EncodedPrompt,
        uses_rank=True,
        uses_alpha=False,
        options={"common_rank": True},
        equation="[P o (u v); E x], P (p, d) common, u (p, r) and v (r, d) the task's",
        federates="averaged tensor by tensor, which is not the mean of the products",
        privacy="exact clipping; p d + r (p + d) numbers",
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
