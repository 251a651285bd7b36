"""What every engine shares: rows of gradients, whole and checked, on their way to a clipped sum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import nn

from ...core.errors import UserError
from ...core.profile import section
from .clippedsum import Block, ClippedSum, Noise, norms_of
from .separate import require_listed, require_separate

# How far a row may lie from its own backward pass: a wrong rule is wrong by a multiple, bf16 by a few thousandths. The
# share of the whole row's norm lets pass a tensor whose gradient is zero but for rounding (the bias of attention keys).
ROW_TOLERANCE = 0.05
WHOLE_TOLERANCE = 0.005


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
        self._sum = ClippedSum(clip)
        self._model = model
        self._expected: int | None = None
        self._verified = False
        self._modules = dict(model.named_modules(remove_duplicate=False))
        require_listed(self._modules, self.trainables)
        self._norms = require_separate(self._modules)

    @property
    def clip(self) -> float:
        """C, the bound on the norm of one unit's gradient."""
        return self._sum.clip

    @clip.setter
    def clip(self, clip: float) -> None:
        self._sum.clip = clip

    @property
    def skipped(self) -> int:
        return self._sum.skipped

    @property
    def within(self) -> int:
        return self._sum.within

    @property
    def over(self) -> int:
        return self._sum.over

    def __enter__(self) -> ClippedGradients:
        # What an earlier step left unreleased must not join this one's sum.
        self._sum.drop()
        self._expected = None
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
                norms = norms_of(blocks, None, 0)
                self._join(blocks, norms, units)
            # A row that is not finite spoils the backward pass of every other: the next batch is verified instead.
            if verify and all(map(math.isfinite, norms)) and any(norms):
                row = max(row for row, norm in enumerate(norms) if norm)
                with section("backward"):
                    self._verify(losses, row, norms[row])
                self._verified = True

    def _join(self, blocks: Sequence[Block], norms: Sequence[float], units: torch.Tensor | None) -> None:
        """Have the rows join the sum."""
        self._sum.add(blocks, norms, units)

    def drop(self) -> None:
        """Forget what was added since the last :meth:`release`, and any forward pass that broke off, for a step that
        begins again with the same sample."""
        self._sum.drop()
        self._expected = None
        self._detach()
        self._attach()

    def rehearse(self, losses: torch.Tensor) -> None:
        """Take the memory that :meth:`add` would take, and keep nothing: no row is verified, nothing joins the sum."""
        with torch.autocast(losses.device.type, enabled=False):
            blocks = self._rows(losses, keep_graph=False)
            norms_of(blocks, None, 0)
            for block in blocks:
                block.total([0.5] * len(losses))
        self._detach()
        self._attach()

    def _layout(self) -> list[nn.Parameter]:
        """The trainables in the order in which the blocks hold them."""
        return list(self.trainables.values())

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        """Write (sum + noise_multiplier * C * N(0, I)) / expected_batch into each parameter's ``grad``.

        ``noise_multiplier`` and ``expected_batch`` are the plan's; zero noise is for measuring the clipped sum itself.
        """
        layout = self._layout()
        size = sum(parameter.numel() for parameter in layout)
        noisy = self._sum.release(noise_multiplier, expected_batch, noise, size, layout[0])
        at = 0
        for parameter in layout:
            size = parameter.numel()
            parameter.grad = noisy[at : at + size].view_as(parameter).to(parameter.dtype)
            at += size


def row_is_off(got: torch.Tensor, want: torch.Tensor, norm: float) -> bool:
    """Whether a tensor's part of a row is another than its own backward pass gave; ``norm``: of the whole row."""
    slack = ROW_TOLERANCE * float(want.norm()) + WHOLE_TOLERANCE * norm
    return not float((got - want).norm()) <= slack
