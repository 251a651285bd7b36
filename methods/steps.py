"""What a method does at the steps of a local training, beside following its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.config import MethodConfig
from ..core.tasks import Batch, Task

if TYPE_CHECKING:
    from .attach import AttachedAdapter


class Steps:
    """One training's, made anew for each; ``first`` is the number of its first step in the run, ``total`` the run's.

    Whatever is drawn comes from torch's generators, which the training has seeded. Under differential privacy
    :meth:`gradients` sees sums that are clipped and noised, and nothing but :meth:`losses` sees a record: all else is
    post-processing.
    """

    def __init__(self, adapter: AttachedAdapter, config: MethodConfig, *, first: int, total: int) -> None:
        self.adapter, self.config, self.first, self.total = adapter, config, first, total

    def before(self, step: int) -> None:
        """Called before the forward pass of local step ``step``, counted from 0."""

    def losses(self, task: Task, batch: Batch) -> torch.Tensor:
        """What each record's gradient is of, (B,): the task's loss. Each must hang on its own record alone."""
        return task.losses(self.adapter.model, batch)

    def gradients(self, step: int) -> None:
        """Called when each trainable's ``grad`` holds the step's gradient, before the optimizer follows it."""

    def after(self, step: int) -> None:
        """Called when the optimizer has changed the trainables."""

    def close(self) -> None:
        """Called once the training is over or has failed: leaves the model as it computes by itself."""
