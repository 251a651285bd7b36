"""Exact per-unit clipping through Opacus, for the layers it is right for; a refusal that names the tensor for the rest.

Opacus's hooks are attached to the model in place (never wrapped, so that tensor names stay what they are) and write
each trainable's per-sample gradient. This file checks that they did, for every trainable, on every batch, and holds one
row of the first batch against a backward pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import LoraLayer
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError

ENGINES = ("exact", "opacus")
_EXACT = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, Conv1D)
_EXACT_NORMS = ("RMSNorm", "T5LayerNorm")
# How far a row may lie from its own backward pass: a wrong rule is wrong by a multiple, bf16 by a few thousandths. The
# share of the whole row's norm lets pass a tensor whose gradient is zero but for rounding (the bias of attention keys).
_ROW_TOLERANCE = 0.05
_WHOLE_TOLERANCE = 0.005


class Noise(Protocol):
    """Whatever draws the noise of a step."""

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Normals of standard deviation 1 in the shape, dtype and device of ``tensor``."""
        ...


def create_engine(name: str, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> ClippedGradients:
    """The engine that ``privacy.engine`` names. Raises :class:`UserError` where it could not be exact."""
    if name not in ENGINES:
        raise UserError(f"privacy.engine is `{name}`; there are {', '.join(ENGINES)}")
    return ClippedGradients(model, trainables, clip)


class ClippedGradients:
    """Turns per-sample losses into one noisy, clipped gradient a logical batch.

    ``trainables``: the parameters that train, by name; ``clip``: C; use as a context manager, since it hooks ``model``.
    Say :meth:`expect` before each forward pass and :meth:`add` after it, for each physical batch of a step; then
    :meth:`release`, also for an empty step. ``clip`` may be set between steps. ``skipped`` counts rows left out because
    they were not finite; ``within`` and ``over`` count the units of the step so far whose norm was at most C, and above
    it. None of the three is noised: they must not leave the site.

    Guarantee
    ---------
    With losses that each hang on their own row alone, and all rows of a privacy unit in one :meth:`add`, the sum that
    :meth:`release` noises has L2 sensitivity C under add/remove of a unit: the gradients of a unit's rows are summed
    and scaled by min(1, C / norm), norms and sums in float32 (or wider) over *all* trainables. Construction
    raises :class:`UserError` for a trainable without an exact per-sample gradient, for one that is not listed, and for
    layers that normalise over the batch.
    """

    def __init__(self, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> None:
        self.trainables = dict(trainables)
        self.clip = clip
        self.skipped = self.within = self.over = 0
        self._expected: int | None = None
        self._model = model
        require_exact(model, self.trainables)
        self._norms = _require_separate(model)
        self._verified = False
        self._sum: torch.Tensor | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._hooks: GradSampleHooks | None = None

    @property
    def clip(self) -> float:
        """C, the bound on the norm of one unit's gradient."""
        return self._clip

    @clip.setter
    def clip(self, clip: float) -> None:
        if not (clip > 0 and math.isfinite(clip)):
            raise UserError(f"privacy.clip is {clip:g}; it must be a positive, finite number")
        self._clip = clip

    def expect(self, rows: int) -> None:
        """Say how many rows the next forward pass will have."""
        self._expected = rows

    def __enter__(self) -> ClippedGradients:
        # What an earlier step left unreleased must not join this one's sum.
        self._sum, self._modes = None, []
        self._expected, self.within, self.over = None, 0, 0
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
            for leftover in ("activations", "max_batch_len"):
                if hasattr(module, leftover):
                    delattr(module, leftover)
        for parameter in self.trainables.values():
            parameter.grad = None
            for leftover in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, leftover):
                    delattr(parameter, leftover)

    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        """Backward through ``losses`` (one a row, shape (B,)), clip each unit's gradient and add it to the sum.

        ``units`` (B,): rows with the same number belong to one privacy unit, which must be whole in this batch: their
        gradients are summed, then clipped once. Without it each row is a unit.
        """
        if losses.dim() != 1:
            raise UserError(
                f"the task gave a loss of shape {list(losses.shape)}; under DP it must be one number an example"
            )
        expected, self._expected = self._expected, None
        if expected is not None and expected != len(losses):
            raise UserError(f"the task gave {len(losses)} losses for {expected} examples; under DP each needs its own")
        if units is not None and units.shape != losses.shape:
            raise ValueError(f"{len(units)} unit numbers for {len(losses)} rows")
        if not len(losses):
            return
        for path, module in self._norms:
            if module.training:
                raise UserError(f"layer {path} keeps statistics of the batch while in training mode; set it to eval")
        # Under autocast the sums below would be in half precision, and the bound with them.
        with torch.autocast(losses.device.type, enabled=False):
            verify = not self._verified and len(losses) > 1
            gradients = self._rows(losses, keep_graph=verify)
            norms = torch.linalg.vector_norm(gradients, dim=1)
            finite = torch.isfinite(norms)
            if verify:
                self._verify(losses, gradients, norms)
            self._accumulate(gradients, finite, units)

    def _accumulate(self, gradients: torch.Tensor, finite: torch.Tensor, units: torch.Tensor | None) -> None:
        """Add the rows of ``gradients`` to the sum, each unit's scaled to norm C at most."""
        if not bool(finite.all()):
            self.skipped += int((~finite).sum())
            gradients = torch.where(finite[:, None], gradients, 0.0)
        if units is not None:
            _, index = torch.unique(units[finite].to(gradients.device), return_inverse=True)
            rows = gradients[finite]
            gradients = rows.new_zeros(int(index.max()) + 1 if len(index) else 0, rows.shape[1])
            gradients.index_add_(0, index, rows)
        norms = torch.linalg.vector_norm(gradients, dim=1)
        # A sum of finite rows may overflow; rows that were left out above have norm zero here.
        usable = torch.isfinite(norms)
        if not bool(usable.all()):
            self.skipped += int((~usable).sum())
            gradients = torch.where(usable[:, None], gradients, 0.0)
        counted = usable if units is not None else usable & finite
        self.within += int((counted & (norms <= self.clip)).sum())
        self.over += int((counted & (norms > self.clip)).sum())
        scale = torch.where(usable, (self.clip / norms.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        total = scale @ gradients
        self._sum = total if self._sum is None else self._sum + total

    def _rows(self, losses: torch.Tensor, *, keep_graph: bool) -> torch.Tensor:
        """Each row's gradient over all trainables, shape (B, P), float32 or wider."""
        rows = len(losses)
        losses.sum().backward(retain_graph=keep_graph)
        parts = []
        for name, parameter in self.trainables.items():
            sample = getattr(parameter, "grad_sample", None)
            if sample is None:
                raise UserError(
                    f"tensor {name} got no per-sample gradient, so nothing is trained; gradient checkpointing, where "
                    "it is on, must be reentrant"
                )
            if isinstance(sample, list) or sample.shape != (rows, *parameter.shape):
                raise UserError(
                    f"tensor {name}: its per-sample gradient does not have one row for each of the {rows} examples; "
                    "it cannot be trained with privacy"
                )
            flat = sample.reshape(rows, -1)
            parts.append(flat if flat.dtype == torch.float64 else flat.float())
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return torch.cat(parts, dim=1)

    def _verify(self, losses: torch.Tensor, gradients: torch.Tensor, norms: torch.Tensor) -> None:
        """Raise :class:`UserError` unless the last usable row equals what its loss alone gives, tensor by tensor.

        Rows that were mixed up (tokens routed between experts, something built once for a whole batch) and uses of a
        trainable that no hook saw have the right shape; only this tells.
        """
        usable = torch.nonzero(norms > 0)
        # A row that is not finite spoils the backward pass of every other: the next batch is verified instead.
        if not len(usable) or not bool(torch.isfinite(norms).all()) or self._hooks is None:
            return
        row = int(usable[-1])
        self._hooks.disable_hooks()
        try:
            losses[row].backward()
        finally:
            self._hooks.enable_hooks()
        at = 0
        for name, parameter in self.trainables.items():
            got = gradients[row, at : at + parameter.numel()]
            want = torch.zeros_like(got) if parameter.grad is None else parameter.grad.reshape(-1).to(got.dtype)
            at += parameter.numel()
            parameter.grad = None
            slack = _ROW_TOLERANCE * float(want.norm()) + _WHOLE_TOLERANCE * float(norms[row])
            if not float((got - want).norm()) <= slack:
                raise _refusal(name, "the hooks gave another gradient than its example alone")
        self._verified = True

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        """Write (sum + noise_multiplier * C * N(0, I)) / expected_batch into each parameter's ``grad``.

        ``noise_multiplier`` and ``expected_batch`` are the plan's; zero noise is for measuring the clipped sum itself.
        """
        if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier) and expected_batch > 0):
            raise ValueError(f"noise multiplier {noise_multiplier} or expected batch {expected_batch} makes no sense")
        total = self._sum
        if total is None:
            first = next(iter(self.trainables.values()))
            wide = torch.float64 if first.dtype == torch.float64 else torch.float32
            size = sum(parameter.numel() for parameter in self.trainables.values())
            total = torch.zeros(size, dtype=wide, device=first.device)
        self._sum, self.within, self.over = None, 0, 0
        noisy = (total + noise_multiplier * self.clip * noise.normal_like(total)) / expected_batch
        at = 0
        for parameter in self.trainables.values():
            size = parameter.numel()
            parameter.grad = noisy[at : at + size].view_as(parameter).to(parameter.dtype)
            at += size


def _require_separate(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that keep records apart only in eval mode; raises :class:`UserError` for one that never does."""
    norms: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        if module.running_mean is not None:
            norms.append((path, module))
        elif isinstance(module, _BatchNorm):
            raise UserError(
                f"layer {path} ({type(module).__name__}) normalises over the batch, which mixes records: "
                "this model cannot be trained with privacy"
            )
    return norms


def require_exact(model: nn.Module, trainables: Mapping[str, nn.Parameter], engine: str = "exact") -> None:
    """Raise :class:`UserError` that names the first trainable whose owner has no exact per-sample rule."""
    if engine not in ENGINES:
        raise UserError(f"privacy.engine is `{engine}`; there are {', '.join(ENGINES)}")
    if not trainables:
        raise UserError("no tensor trains: there is nothing to clip")
    for name, parameter in trainables.items():
        if not parameter.requires_grad:
            raise UserError(f"tensor {name} is listed as trained but is frozen")
    names = {id(parameter): name for name, parameter in trainables.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in names:
            raise UserError(f"tensor {name} trains but is not among the adapter's tensors: it would escape clipping")
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
        f"tensor {name} has no exact per-sample gradient ({why}), so it cannot be trained with privacy; "
        "choose lora, rslora, bitfit, ln or prefix, or say privacy.enabled = false"
    )
