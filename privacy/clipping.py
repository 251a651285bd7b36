"""Exact per-unit clipping through Opacus, for the layers it is right for; a refusal that names the tensor for the rest.

Opacus's hooks are attached to the model in place (never wrapped, so that tensor names stay what they are) and write
each trainable's per-sample gradient. This file checks that they did, for every trainable, on every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import LoraLayer
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError
from .noise import RandomStream

_EXACT = (nn.Linear, nn.LayerNorm, nn.RMSNorm, Conv1D)
_EXACT_NORMS = ("RMSNorm", "T5LayerNorm")


class ClippedGradients:
    """Turns per-sample losses into one noisy, clipped gradient a logical batch.

    ``trainables``: the parameters that train, by name; ``clip``: C; use as a context manager, since it hooks ``model``.
    Call :meth:`add` for each physical batch of a step, then :meth:`release`, also for an empty batch.

    Guarantee
    ---------
    With rows that belong to one privacy unit each, the sum that :meth:`release` noises has L2 sensitivity C under
    add/remove of a unit: each row is scaled by min(1, C / norm), norms and sums in float32 over *all* trainables.
    Construction raises :class:`UserError` for a trainable without an exact per-sample gradient.
    """

    def __init__(self, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> None:
        self.trainables = dict(trainables)
        self.clip = clip
        self.skipped = 0
        self._model = model
        _require_exact(model, self.trainables)
        self._sum: torch.Tensor | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._hooks: GradSampleHooks | None = None

    def __enter__(self) -> ClippedGradients:
        try:
            self._hooks = GradSampleHooks(self._model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise UserError(f"no exact per-sample gradients for this model: {str(error)[:200]}") from None
        # Opacus records activations in training mode only; the rest of the model stays as it is.
        for module in self._model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                self._modes.append((module, module.training))
                module.training = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is not None:
            self._hooks.remove_hooks()
            self._hooks = None
        for module, mode in self._modes:
            module.training = mode
            if hasattr(module, "activations"):
                del module.activations
        for parameter in self.trainables.values():
            parameter.grad = None
            for leftover in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, leftover):
                    delattr(parameter, leftover)

    def add(self, losses: torch.Tensor) -> None:
        """Backward through ``losses`` (one a row, shape (B,)), clip each row's gradient and add it to the sum."""
        if losses.dim() != 1:
            raise UserError(
                f"the task gave a loss of shape {list(losses.shape)}; under DP it must be one number an example"
            )
        rows = len(losses)
        losses.sum().backward()
        parts = []
        for name, parameter in self.trainables.items():
            sample = getattr(parameter, "grad_sample", None)
            if sample is None:
                raise UserError(f"tensor {name} got no per-sample gradient; it cannot be trained with privacy")
            if isinstance(sample, list) or sample.shape != (rows, *parameter.shape):
                raise UserError(
                    f"tensor {name}: its per-sample gradient does not have one row for each of the {rows} examples; "
                    "it cannot be trained with privacy"
                )
            parts.append(
                sample.reshape(rows, -1).float() if sample.dtype != torch.float64 else sample.reshape(rows, -1)
            )
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        gradients = torch.cat(parts, dim=1)
        norms = torch.linalg.vector_norm(gradients, dim=1)
        finite = torch.isfinite(norms)
        scale = torch.where(finite, (self.clip / norms.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        if not bool(finite.all()):
            self.skipped += int((~finite).sum())
            gradients = torch.where(finite[:, None], gradients, 0.0)
        total = scale @ gradients
        self._sum = total if self._sum is None else self._sum + total

    def release(self, noise_multiplier: float, expected_batch: float, stream: RandomStream) -> None:
        """Write (sum + noise_multiplier * C * N(0, I)) / expected_batch into each parameter's ``grad``."""
        total = self._sum
        if total is None:
            first = next(iter(self.trainables.values()))
            wide = torch.float64 if first.dtype == torch.float64 else torch.float32
            size = sum(parameter.numel() for parameter in self.trainables.values())
            total = torch.zeros(size, dtype=wide, device=first.device)
        self._sum = None
        noisy = (total + noise_multiplier * self.clip * stream.normal_like(total)) / expected_batch
        at = 0
        for parameter in self.trainables.values():
            size = parameter.numel()
            parameter.grad = noisy[at : at + size].view_as(parameter).to(parameter.dtype)
            at += size


def _require_exact(model: nn.Module, trainables: Mapping[str, nn.Parameter]) -> None:
    """Raise :class:`UserError` that names the first trainable whose owner has no exact per-sample rule."""
    names = {id(parameter): name for name, parameter in trainables.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in names:
            raise UserError(f"tensor {name} trains but is not among the adapter's tensors: it would escape clipping")
    covered: set[int] = set()
    # A prefix is looked up once for each example; other virtual tokens are built once for a whole batch.
    per_example = {
        id(m) for encoder in model.modules() if isinstance(encoder, PrefixEncoder) for m in encoder.modules()
    }
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(module.use_dora.values()):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    raise _refusal(f"{path}.{name}", "DoRA computes its factors' effect outside their own layers")
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in names or not parameter.requires_grad:
                continue
            if not (_is_exact(module) or id(module) in per_example):
                raise _refusal(names[id(parameter)], f"its layer is {type(module).__name__}")
            if id(parameter) in covered:
                raise _refusal(names[id(parameter)], "two layers share it")
            covered.add(id(parameter))
    for identity, name in names.items():
        if identity not in covered and trainables[name].requires_grad:
            raise _refusal(name, "no layer of the model owns it")


def _is_exact(module: nn.Module) -> bool:
    return type(module) in _EXACT or type(module).__name__.endswith(_EXACT_NORMS)


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"tensor {name} has no exact per-sample gradient ({why}), so it cannot be trained with privacy; "
        "choose lora, rslora, bitfit, ln or prefix, or say privacy.enabled = false"
    )
