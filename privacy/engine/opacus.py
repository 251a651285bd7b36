"""Per-sample gradients from Opacus's hooks, for the layers they are right for; a refusal that names the tensor else.

The hooks are attached to the model in place (never wrapped, so that tensor names stay what they are).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import LoraLayer
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import UserError
from .clippedsum import Block, Dense, wide
from .gradients import ClippedGradients, row_is_off

_EXACT = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, Conv1D)
_EXACT_NORMS = ("RMSNorm", "T5LayerNorm")


class OpacusGradients(ClippedGradients):
    """Opacus's hooks, which must have written a row for every trainable on every batch."""

    def __init__(self, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> None:
        super().__init__(model, trainables, clip)
        _require_rules(model, self.trainables)
        self._modes: list[tuple[nn.Module, bool]] = []
        self._hooks: GradSampleHooks | None = None
        self._gradients = torch.empty(0)

    def _attach(self) -> None:
        self._modes = []
        try:
            self._hooks = GradSampleHooks(self._model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise UserError(f"no exact per-sample gradients for this model: {str(error)[:200]}") from None
        # Opacus records activations in training mode only; the rest of the model stays as it is.
        for module in self._model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                self._modes.append((module, module.training))
                module.training = True

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove_hooks()
            self._hooks = None
        for module, mode in self._modes:
            module.training = mode
            for leftover in ("activations", "max_batch_len"):
                if hasattr(module, leftover):
                    delattr(module, leftover)
        for parameter in self.trainables.values():
            for leftover in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, leftover):
                    delattr(parameter, leftover)

    def _rows(self, losses: torch.Tensor, *, keep_graph: bool) -> Sequence[Block]:
        rows = len(losses)
        losses.sum().backward(retain_graph=keep_graph)
        parts = []
        for name, parameter in self.trainables.items():
            sample = getattr(parameter, "grad_sample", None)
            if sample is None:
                raise UserError(
                    f"tensor {name} got no per-sample gradient, so nothing is trained; gradient checkpointing, where "
                    'it is on, must be reentrant for Opacus; privacy.engine = "exact" takes either'
                )
            if isinstance(sample, list) or sample.shape != (rows, *parameter.shape):
                raise UserError(
                    f"tensor {name}: its per-sample gradient does not have one row for each example; it cannot be "
                    "trained with privacy"
                )
            parts.append(sample.reshape(rows, -1).to(wide(sample.dtype)))
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        self._gradients = torch.cat(parts, dim=1)
        return [Dense(self._gradients)]

    def _verify(self, losses: torch.Tensor, row: int, norm: float) -> None:
        """Rows that were mixed up (tokens routed between experts, something built once for a whole batch) and uses of a
        trainable that no hook saw have the right shape; only this tells."""
        if self._hooks is None:
            return
        self._hooks.disable_hooks()
        try:
            losses[row].backward()
        finally:
            self._hooks.enable_hooks()
        at = 0
        for name, parameter in self.trainables.items():
            got = self._gradients[row, at : at + parameter.numel()]
            want = torch.zeros_like(got) if parameter.grad is None else parameter.grad.reshape(-1).to(got.dtype)
            at += parameter.numel()
            parameter.grad = None
            if row_is_off(got, want, norm):
                raise _refusal(name, "the hooks gave another gradient than its example alone")


def _require_rules(model: nn.Module, trainables: Mapping[str, nn.Parameter]) -> None:
    """Raise :class:`UserError` that names the first trainable whose owner has no rule in Opacus that is exact."""
    names = {id(parameter): name for name, parameter in trainables.items()}
    covered: set[int] = set()
    # A prefix is looked up once for each example; other virtual tokens are built once for a whole batch.
    per_example = {
        id(m) for encoder in model.modules() if isinstance(encoder, PrefixEncoder) for m in encoder.modules()
    }
    for module in model.modules():
        variants = module.lora_variant if isinstance(module, LoraLayer) else None
        for parameter in module.parameters() if variants else ():
            if id(parameter) in names:
                raise _refusal(names[id(parameter)], "this variant of LoRA uses it outside its own layer")
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in names:
                continue
            if not (_is_exact(module) or id(module) in per_example):
                raise _refusal(names[id(parameter)], f"its layer is {type(module).__name__}")
            if id(parameter) in covered:
                raise _refusal(names[id(parameter)], "two layers share it")
            covered.add(id(parameter))
    for identity, name in names.items():
        if identity not in covered:
            raise _refusal(name, "no layer of the model owns it")


def _is_exact(module: nn.Module) -> bool:
    return type(module) in _EXACT or type(module).__name__.endswith(_EXACT_NORMS)


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"tensor {name} has no exact per-sample gradient in Opacus ({why}), so it cannot be trained with privacy; "
        'choose privacy.engine = "exact", or lora, rslora, bitfit, ln or prefix'
    )
