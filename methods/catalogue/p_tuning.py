"""P-tuning: a small network makes the virtual tokens before a text."""

from __future__ import annotations

from typing import Literal

from peft import PromptEncoderConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width
from ..encoded import EncodedPrompt
from ..registry import Method, MethodOptions, register
from .prefix import virtual_token_meaning
from .prompt import require_prompt


class PTuningOptions(MethodOptions):
    encoder: Literal["MLP", "LSTM"] = Field("MLP", description="the network; the paper's LSTM has an MLP behind it")
    encoder_hidden_size: int = Field(0, ge=0, description="its width; 0: the model's")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> PromptEncoderConfig:
    require_prompt("P-tuning", task, base)
    options = PTuningOptions.model_validate(dict(config.options))
    return PromptEncoderConfig(
        task_type=task.peft_type,
        num_virtual_tokens=config.virtual_tokens,
        encoder_reparameterization_type=options.encoder,
        encoder_hidden_size=options.encoder_hidden_size or hidden_width(base.model),
        modules_to_save=list(base.head) or None,
    )


register(
    Method(
        name="p-tuning",
        summary="virtual token embeddings that an MLP or LSTM makes",
        source="Liu et al. 2021, arXiv 2103.10385",
        configure=_configure,
        meaning=virtual_token_meaning,
        attached=EncodedPrompt,
        Options=PTuningOptions,
        equation="[f(P); E x], P p trained embeddings and f a trained network, which the finished prompt outlives",
        federates="P and f are averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; p d numbers and those of f, 3 d^2 + 3 d",
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
