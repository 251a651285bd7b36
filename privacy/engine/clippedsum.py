"""The sum of one step: each unit's gradient scaled to the clip at most, and noise once for all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from ...core.errors import UserError
from ...core.profile import section


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


class ClippedSum:
    """One site's sum of a step. ``clip``: C, which may be set between steps.

    ``skipped`` counts rows left out because they were not finite; ``within`` and ``over`` count the units of the step
    so far whose norm was at most C, and above it. None of the three is noised.
    """

    def __init__(self, clip: float) -> None:
        self.clip = clip
        self.skipped = self.within = self.over = self._skipped_before = 0
        self._sum: torch.Tensor | None = None

    @property
    def clip(self) -> float:
        """C, the bound on the norm of one unit's gradient."""
        return self._clip

    @clip.setter
    def clip(self, clip: float) -> None:
        if not (clip > 0 and math.isfinite(clip)):
            raise UserError(f"privacy.clip is {clip:g}; it must be a positive, finite number")
        self._clip = clip

    def add(self, blocks: Sequence[Block], norms: Sequence[float], units: torch.Tensor | None) -> None:
        """Add the rows of ``blocks``, each unit's gradient scaled to norm C at most.

        ``norms``: of each row by itself; ``units`` (B,): rows with the same number belong to one unit, without it each
        row is one.
        """
        # A batch has few rows: plain numbers are faster than tensors, and as wide.
        numbers: dict[int, int] = {}
        if units is None:
            groups, unit_norms = list(range(len(norms))), list(norms)
        else:
            # A unit without a usable row is none of this batch's.
            groups = [
                numbers.setdefault(unit, len(numbers)) if math.isfinite(norm) else -1
                for unit, norm in zip(units.tolist(), norms, strict=True)
            ]
            unit_norms = norms_of(blocks, torch.tensor(groups, device=units.device), len(numbers))
        scales = [self._scale(norm) for norm in unit_norms]
        weights = [scales[group] if group >= 0 else 0.0 for group in groups]
        self.skipped += weights.count(0.0)
        self.within += sum(norm <= self.clip for norm in unit_norms)
        self.over += sum(self.clip < norm < math.inf for norm in unit_norms)
        totals = [block.total(weights) for block in blocks]
        total = totals[0] if len(totals) == 1 else torch.cat(totals)
        self._sum = total if self._sum is None else self._sum.add_(total)

    def _scale(self, norm: float) -> float:
        """What brings a gradient of this norm to C at most; 0 for one that is not finite."""
        if not math.isfinite(norm):
            return 0.0
        return 1.0 if norm <= self.clip else self.clip / norm

    def drop(self) -> None:
        """Forget what was added since the last release."""
        self._sum = None
        self.within = self.over = 0
        self.skipped = self._skipped_before

    def release(
        self, noise_multiplier: float, expected_batch: float, noise: Noise, size: int, like: torch.Tensor
    ) -> torch.Tensor:
        """(sum + noise_multiplier * C * N(0, I)) / expected_batch, ``size`` numbers; the next step's sum is empty.

        ``like``: a tensor in the precision and on the device of an empty sum.
        """
        if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier) and expected_batch > 0):
            raise ValueError(f"noise multiplier {noise_multiplier} or expected batch {expected_batch} makes no sense")
        total = self._sum
        if total is None:
            total = torch.zeros(size, dtype=wide(like.dtype), device=like.device)
        self._sum = None
        self.within = self.over = 0
        self._skipped_before = self.skipped
        with section("noise"):
            return (total + noise_multiplier * self.clip * noise.normal_like(total)) / expected_batch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which gradients of ``dtype`` are kept, measured and added."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norms_of(blocks: Sequence[Block], groups: torch.Tensor | None, count: int) -> list[float]:
    """The norm of each group's summed gradient (of each row, without ``groups``) over all blocks."""
    squares = [block.squares(groups, count) for block in blocks]
    norms: list[float] = sum(squares[1:], start=squares[0]).sqrt().tolist()
    return norms
