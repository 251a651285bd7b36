"""PEFT configurations for tuners that stand in the place of linear layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.adapter import AdapterSpec
from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.errors import UserError
from ..core.tasks import Task
from .attach import AttachedAdapter
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
    options: bool = True,
    weights: bool = False,
    **fields: Any,
) -> Config:
    """A configuration of ``kind`` for the attention of ``base``, or for ``method.target_modules``.

    ``weights``: whether the tuner's tensors hang on the values of the base weights, and not on their shapes alone.

    ``fields`` are set as they are, and with ``options`` each of the method's options, which bear PEFT's names. Raises
    :class:`UserError` for a module that the tuner does not take: GPT-2 has ``Conv1D``, which few do.
    """
    method = create_method(config.name)
    if weights and next(base.model.parameters()).is_meta:
        raise UserError(
            f"method {config.name} begins with the base weights, which a model that is counted has not: choose lora"
        )
    targets = attention_targets(base.model, config)
    for path, module in base.model.named_modules():
        if any(f".{path}".endswith(f".{target}") for target in targets):
            if isinstance(module, Conv1D) and not conv1d:
                raise UserError(f"method {config.name} does not fit {path}, which is a Conv1D: choose lora or houlsby")
            if not isinstance(module, nn.Linear | Conv1D):
                raise UserError(f"method {config.name} fits linear layers; leave {path} out of method.target_modules")
    if "layers" in method.accepts:
        fields["layers_to_transform"] = list(config.layers) or None
    if options:
        fields = method.options_of(config).model_dump() | fields
    return kind(
        task_type=task.peft_type or None,
        target_modules=targets,  # type: ignore[call-arg]
        modules_to_save=list(base.head) or None,
        **fields,
    )


def computed_bases(bases: Callable[[nn.Module], Iterable[torch.Tensor]]) -> Callable[..., AttachedAdapter]:
    """``Method.attached`` where the tuner computes what is frozen from the base weights, at each site anew.

    ``bases`` gives those vectors, as rows, or numbers of outputs. Singular vectors have no sign of their own, and
    another machine may find others, to which the exchanged tensors would not belong: so the description of the
    adapter has their signs and places in it, and a site with other ones is turned away.
    """

    def attached(model: PeftModel, spec: AdapterSpec, *rest: Any) -> AttachedAdapter:
        total = hashlib.sha256()
        for rows in bases(model):
            total.update(json.dumps(_marks(rows)).encode())
        return AttachedAdapter(model, replace(spec, options={**spec.options, "bases": total.hexdigest()[:16]}), *rest)

    return attached


def _marks(rows: torch.Tensor) -> list[Any]:
    """Where each row is largest, and with which sign; whole numbers as they are."""
    if rows.is_meta:
        return []  # a model without weights, to count on
    if not rows.is_floating_point():
        return [rows.tolist()]
    at = rows.abs().argmax(dim=1, keepdim=True)
    return [at[:, 0].tolist(), torch.sign(rows.gather(1, at))[:, 0].tolist()]


def layers_in(model: nn.Module, kind: type[Any]) -> list[Any]:
    """The modules of ``kind``, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]
