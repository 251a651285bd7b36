"""PEFT configurations for tuners that stand in the place of linear layers."""

from __future__ import annotations

from typing import TypeVar

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.errors import UserError
from ..core.tasks import Task
from .registry import attention_targets, create_method

Config = TypeVar("Config", bound=PeftConfig)

#: What such a method makes use of, where its tuner can be kept to some layers.
ON_LAYERS = frozenset({"target_modules", "layers"})


def on_layers(
    kind: type[Config],
    config: MethodConfig,
    task: Task,
    base: BaseModel,
    *,
    conv1d: bool = False,
    **fields: object,
) -> Config:
    """A configuration of ``kind`` for the attention of ``base``, or for ``method.target_modules``.

    ``fields`` are set as they are, and so is each of the method's options, which bear PEFT's names. Raises
    :class:`UserError` for a module that the tuner does not take: GPT-2 has ``Conv1D``, which few do.
    """
    method = create_method(config.name)
    targets = attention_targets(base.model, config)
    for path, module in base.model.named_modules():
        if any(f".{path}".endswith(f".{target}") for target in targets):
            if isinstance(module, Conv1D) and not conv1d:
                raise UserError(f"method {config.name} does not fit {path}, which is a Conv1D: choose lora or houlsby")
            if not isinstance(module, nn.Linear | Conv1D):
                raise UserError(f"method {config.name} fits linear layers; leave {path} out of method.target_modules")
    if "layers" in method.accepts:
        fields["layers_to_transform"] = list(config.layers) or None
    settings = method.options_of(config).model_dump() | fields
    return kind(
        task_type=task.peft_type or None,
        target_modules=targets,  # type: ignore[call-arg]
        modules_to_save=list(base.head) or None,
        **settings,
    )
