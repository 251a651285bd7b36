"""BEFT: a trained shift of the values alone."""

from __future__ import annotations

from peft import BeftConfig

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import layers_of
from ..registry import Method, meaning_by, register
from ..wrapping import on_layers


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> BeftConfig:
    if not config.target_modules:
        # The values' projections, by their full paths' ends.
        values = {
            attention.value.rpartition(".")[2] for layer in layers_of(base.model) for attention in layer.attentions
        }
        config = config.model_copy(update={"target_modules": tuple(sorted(values))})
    return on_layers(BeftConfig, config, task, base)


register(
    Method(
        name="beft",
        summary="the bias of the value projections",
        source="Huang et al. 2025, arXiv 2509.15974",
        configure=_configure,
        meaning=meaning_by((".beft_bias.", "bias", "linear")),
        accepts=frozenset({"target_modules"}),
        equation="v <- W0 x + b0 + db",
        federates="averages exactly",
        privacy="exact clipping; d numbers a layer",
        kind="partial",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
