"""LLaMA-Adapter: gated prompts in the attention of the topmost layers of a language model."""

from __future__ import annotations

from peft import AdaptionPromptConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import layers_of
from ..registry import Method, MethodOptions, meaning_by, register


class LlamaAdapterOptions(MethodOptions):
    adapter_layers: int = Field(0, ge=0, description="topmost layers that are adapted; 0: all but the first")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> AdaptionPromptConfig:
    family = getattr(base.model.config, "model_type", "")
    if task.name != "causal-lm" or family not in ("llama", "mistral", "gpt2"):
        raise UserError(
            f"method llama-adapter is for Llama, Mistral and GPT-2 that write, not {type(base.model).__name__} for "
            f"{task.name}: choose prefix or lora"
        )
    options = LlamaAdapterOptions.model_validate(dict(config.options))
    return AdaptionPromptConfig(
        task_type=task.peft_type,
        adapter_len=config.virtual_tokens,
        adapter_layers=options.adapter_layers or max(1, len(layers_of(base.model)) - 1),
    )


register(
    Method(
        name="llama-adapter",
        summary="gated prompts in the attention of the topmost layers",
        source="Zhang et al. 2023, arXiv 2303.16199",
        configure=_configure,
        meaning=meaning_by((".adaption_", "prompt", "nonlinear")),
        Options=LlamaAdapterOptions,
        dp="refused: its attention passes no single examples",
        equation="y = attention(x) + g softmax(q K(P)) V(P), g a trained gate that starts at zero",
        federates="averaged position by position; the mean is not the mean of the functions",
        privacy="refused: the engine cannot pass its attention example by example; choose prefix",
        kind="prompt",
        merges=False,
        contract={
            "lr": 1e-1,
            "unfit": {
                **dict.fromkeys(("bert", "roberta", "t5", "vit"), "choose prefix"),
                "gpt2/sequence-classification": "choose prefix",
                "llama/sequence-classification": "choose prefix",
            },
        },
    )
)
