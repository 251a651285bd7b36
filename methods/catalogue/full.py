"""Full fine-tuning: every weight of the base model trains and is exchanged. What parameter-efficient methods spare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ...core.adapter import AdapterState, Averaging
from ...core.basemodel import BaseModel, load_pretrained, quiet
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..attach import AttachedAdapter
from ..registry import Method, attention_targets, register

_PREFIX = "base_model.model."


def plain_name(name: str) -> str | None:
    """What the tensor ``name`` of the wrapped model is called in the base model; None: it is not in it."""
    if ".lora_" in name or ".original_module." in name:
        return None
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


class WholeModel(AttachedAdapter):
    """All weights of a base model; its folder is that of a model of transformers, as `from_pretrained` loads it."""

    def save_peft(self, folder: str | Path, state: AdapterState) -> Path:
        """Write ``state`` as a whole model, without its tokenizer, which is the base model's."""
        self.write(state)
        model: Any = self.model.get_base_model()
        tensors = {plain_name(f"{_PREFIX}{name}"): tensor for name, tensor in model.state_dict().items()}
        tensors.pop(None, None)
        with quiet():
            model.save_pretrained(str(folder), state_dict=tensors)
        return Path(folder)

    def load_peft(self, folder: str | Path) -> AdapterState:
        """Read a model folder of the same architecture and return its state. Raises :class:`UserError`."""
        # By transformers itself, which keeps some weights under other names on the disk.
        model, missing = load_pretrained(type(self.model.get_base_model()), str(Path(folder).absolute()), seed=0)
        if missing:
            raise UserError(f"{folder}: has no value for tensor {min(missing)} of this run")
        found, tensors = dict(model.named_parameters()), {}
        for tensor in self.spec.bare.tensors:
            name = plain_name(tensor.name)
            if name not in found:
                raise UserError(f"{folder}: has no value for tensor {name} of this run")
            tensors[tensor.name] = found[name].detach().to(getattr(torch, tensor.dtype)).numpy()
        try:
            self.write(AdapterState(self.spec.bare, tensors).require_finite())
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        return self.read()


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    # A model of PEFT's carries an adapter: one frozen rank-1 update that is zero.
    leaf = attention_targets(base.model, MethodConfig())[0]
    carrier = next(name for name, _ in base.model.named_modules() if name.rsplit(".", 1)[-1] == leaf)
    return LoraConfig(
        task_type=task.peft_type or None,
        r=1,
        lora_alpha=1,
        target_modules=[carrier],
        modules_to_save=list(base.head) or None,
    )


def _prepare(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) is not None)
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)


def _meaning(name: str) -> tuple[str, Averaging]:
    return ("head" if ".modules_to_save." in name else "weight"), "nonlinear"


register(
    Method(
        name="full",
        summary="every weight of the base model, to compare with",
        source="McMahan et al. 2017, arXiv 1602.05629",
        configure=_configure,
        prepare=_prepare,
        meaning=_meaning,
        attached=WholeModel,
        equation="W = W0 + dW, all of it",
        federates="averaged weight by weight (FedAvg)",
        privacy="exact clipping; the noise grows with every weight",
        kind="whole",
        merges=False,
    )
)
