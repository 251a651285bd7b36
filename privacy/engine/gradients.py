"""What every engine shares: rows of gradients, summed by privacy unit, clipped, added up, noised."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from ...core.errors import UserError
from ...core.profile import section
from .separate import require_listed, require_separate

# How far a row may lie from its own backward pass: a wrong rule is wrong by a multiple, bf16 by a few thousandths. The
# share of the whole row's norm lets pass a tensor whose gradient is zero but for rounding (the bias of attention keys).
ROW_TOLERANCE = 0.05
WHOLE_TOLERANCE = 0.005


class Noise(Protocol):
    """Whatever draws the noise of a step."""

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Normals of standard deviation 1 in the shape, dtype and device of ``tensor``."""
        ...


class Block(Protocol):
    """The gradients of a batch's rows over some of the trainables, in whatever form."""

    def squares(self, groups: torch.Tensor | None, count: int) -> torch.Tensor:
        """The squared norm of each group's summed gradient, shape (count,).

        ``groups`` (B,): the group of each row, -1 for a row to leave out; None: each row is a group.
        """
        ...

    def total(self, weights: Sequence[float]) -> torch.Tensor:
        """The sum of the rows, each times its weight, as one vector. Weight 0 leaves a row out, finite or not."""
        ...


class Dense:
    """Gradients as a matrix, one row an example."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def squares(self, groups: torch.Tensor | None, count: int) -> torch.Tensor:
        rows = self.rows
        if groups is not None:
            kept = groups >= 0
            rows = rows.new_zeros(count, rows.shape[1]).index_add_(0, groups[kept], rows[kept])
        return torch.linalg.vector_norm(rows, dim=1).square()

    def total(self, weights: Sequence[float]) -> torch.Tensor:
        rows = self.rows
        scale = torch.tensor(weights, dtype=rows.dtype, device=rows.device)
        if 0.0 in weights:
            rows = torch.where(scale[:, None] == 0, 0.0, rows)
        return scale @ rows


class ClippedGradients(ABC):
    """Turns per-sample losses into one noisy, clipped gradient a logical batch.

    ``trainables``: the parameters that train, by name; ``clip``: C; use as a context manager, since it changes
    ``model`` while it is entered. Say :meth:`expect` before each forward pass and :meth:`add` after it, for each
    physical batch of a step; then :meth:`release`, also for an empty step. ``clip`` may be set between steps.
    ``skipped`` counts rows left out because they were not finite; ``within`` and ``over`` count the units of the step
    so far whose norm was at most C, and above it. None of the three is noised: they must not leave the site.

    Guarantee
    ---------
    Neighbouring data sets differ by one privacy unit, added or removed; the site is trusted, nobody else. With losses
    that each hang on their own row alone, and all rows of a unit in one :meth:`add`, the sum that :meth:`release`
    noises has L2 sensitivity C: the gradients of a unit's rows are summed and scaled by min(1, C / norm) (Abadi et al.
    2016, algorithm 1), norms and sums in float32 (or wider) over *all* trainables. Construction raises
    :class:`UserError` for a trainable without an exact per-sample gradient, for one that is not listed, and for layers
    that normalise over the batch. The first batch that a model sees is held against a backward pass of one row's own.
    """

    def __init__(self, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> None:
        self.trainables = dict(trainables)
        self.clip = clip
        self.skipped = self.within = self.over = self._skipped_before = 0
        self._model = model
        self._expected: int | None = None
        self._verified = False
        self._sum: torch.Tensor | None = None
        self._modules = dict(model.named_modules(remove_duplicate=False))
        require_listed(self._modules, self.trainables)
        self._norms = require_separate(self._modules)

    @property
    def clip(self) -> float:
        """C, the bound on the norm of one unit's gradient."""
        return self._clip

    @clip.setter
    def clip(self, clip: float) -> None:
        if not (clip > 0 and math.isfinite(clip)):
            raise UserError(f"privacy.clip is {clip:g}; it must be a positive, finite number")
        self._clip = clip

    def __enter__(self) -> ClippedGradients:
        # What an earlier step left unreleased must not join this one's sum.
        self._sum = self._expected = None
        self.within = self.over = 0
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        for parameter in self.trainables.values():
            parameter.grad = None

    @abstractmethod
    def _attach(self) -> None:
        """Change the model so that backward passes give rows."""

    @abstractmethod
    def _detach(self) -> None:
        """Undo :meth:`_attach`, leaving nothing behind, also after an error within it."""

    @abstractmethod
    def _rows(self, losses: torch.Tensor, *, keep_graph: bool) -> Sequence[Block]:
        """Backward through ``losses``: the gradient of each, over all trainables."""

    @abstractmethod
    def _verify(self, losses: torch.Tensor, row: int, norm: float) -> None:
        """Raise :class:`UserError` unless that row's gradient is what its loss alone gives, tensor by tensor."""

    def expect(self, rows: int) -> None:
        """Say how many rows the next forward pass will have."""
        self._expected = rows

    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        """Backward through ``losses`` (one a row, shape (B,)), clip each unit's gradient and add it to the sum.

        ``units`` (B,): rows with the same number belong to one privacy unit, which must be whole in this batch: their
        gradients are summed, then clipped once. Without it each row is a unit.
        """
        if losses.dim() != 1:
            raise UserError(
                f"the task gave losses of {losses.dim()} dimensions; under DP there must be one number an example"
            )
        expected, self._expected = self._expected, None
        if expected is not None and expected != len(losses):
            # No count: how many records a batch drew is the site's own secret.
            raise UserError("the task gave another number of losses than of examples; under DP each needs its own")
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
            with section("backward"):
                blocks = self._rows(losses, keep_graph=verify)
            with section("clip"):
                norms = self._accumulate(blocks, units)
            # A row that is not finite spoils the backward pass of every other: the next batch is verified instead.
            if verify and all(map(math.isfinite, norms)) and any(norms):
                row = max(row for row, norm in enumerate(norms) if norm)
                with section("backward"):
                    self._verify(losses, row, norms[row])
                self._verified = True

    def drop(self) -> None:
        """Forget what was added since the last :meth:`release`, and any forward pass that broke off, for a step that
        begins again with the same sample."""
        self._sum = self._expected = None
        self.within = self.over = 0
        self.skipped = self._skipped_before
        self._detach()
        self._attach()

    def rehearse(self, losses: torch.Tensor) -> None:
        """Take the memory that :meth:`add` would take, and keep nothing: no row is verified, nothing joins the sum."""
        with torch.autocast(losses.device.type, enabled=False):
            blocks = self._rows(losses, keep_graph=False)
            _norms(blocks, None, 0)
            for block in blocks:
                block.total([0.5] * len(losses))
        self._detach()
        self._attach()

    def _accumulate(self, blocks: Sequence[Block], units: torch.Tensor | None) -> list[float]:
        """Add the rows to the sum, each unit's scaled to norm C at most; gives the norm of each row by itself."""
        # A batch has few rows: plain numbers are faster than tensors, and as wide.
        norms = _norms(blocks, None, 0)
        numbers: dict[int, int] = {}
        if units is None:
            groups, unit_norms = list(range(len(norms))), norms
        else:
            # A unit without a usable row is none of this batch's.
            groups = [
                numbers.setdefault(unit, len(numbers)) if math.isfinite(norm) else -1
                for unit, norm in zip(units.tolist(), norms, strict=True)
            ]
            unit_norms = _norms(blocks, torch.tensor(groups, device=self._layout()[0].device), len(numbers))
        scales = [self._scale(norm) for norm in unit_norms]
        weights = [scales[group] if group >= 0 else 0.0 for group in groups]
        self.skipped += weights.count(0.0)
        self.within += sum(norm <= self.clip for norm in unit_norms)
        self.over += sum(self.clip < norm < math.inf for norm in unit_norms)
        totals = [block.total(weights) for block in blocks]
        total = totals[0] if len(totals) == 1 else torch.cat(totals)
        self._sum = total if self._sum is None else self._sum.add_(total)
        return norms

    def _scale(self, norm: float) -> float:
        """What brings a gradient of this norm to C at most; 0 for one that is not finite."""
        if not math.isfinite(norm):
            return 0.0
        return 1.0 if norm <= self.clip else self.clip / norm

    def _layout(self) -> list[nn.Parameter]:
        """The trainables in the order in which the blocks hold them."""
        return list(self.trainables.values())

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        """Write (sum + noise_multiplier * C * N(0, I)) / expected_batch into each parameter's ``grad``.

        ``noise_multiplier`` and ``expected_batch`` are the plan's; zero noise is for measuring the clipped sum itself.
        """
        if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier) and expected_batch > 0):
            raise ValueError(f"noise multiplier {noise_multiplier} or expected batch {expected_batch} makes no sense")
        layout, total = self._layout(), self._sum
        if total is None:
            size = sum(parameter.numel() for parameter in layout)
            total = torch.zeros(size, dtype=wide(layout[0].dtype), device=layout[0].device)
        self._sum = None
        self.within = self.over = 0
        self._skipped_before = self.skipped
        with section("noise"):
            noisy = (total + noise_multiplier * self.clip * noise.normal_like(total)) / expected_batch
        at = 0
        for parameter in layout:
            size = parameter.numel()
            parameter.grad = noisy[at : at + size].view_as(parameter).to(parameter.dtype)
            at += size


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which gradients of ``dtype`` are kept, measured and added."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norms(blocks: Sequence[Block], groups: torch.Tensor | None, count: int) -> list[float]:
    squares = [block.squares(groups, count) for block in blocks]
    norms: list[float] = sum(squares[1:], start=squares[0]).sqrt().tolist()
    return norms


def row_is_off(got: torch.Tensor, want: torch.Tensor, norm: float) -> bool:
    """Whether a tensor's part of a row is another than its own backward pass gave; ``norm``: of the whole row."""
    slack = ROW_TOLERANCE * float(want.norm()) + WHOLE_TOLERANCE * norm
    return not float((got - want).norm()) <= slack
