"""A short training on records that everyone may see, after which the base model is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..core.basemodel import BaseModel
from ..core.tasks import Example, Task

_BATCH = 16


def head_of(base: BaseModel) -> list[nn.Parameter]:
    """The parameters that the task adds to the base model."""
    return [parameter for name in base.head for parameter in base.model.get_submodule(name).parameters()]


@contextmanager
def rehearsed(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Let ``parameters`` train within, and put them back; gives their first values."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, first in zip(parameters, before, strict=True):
                parameter.copy_(first)
                parameter.requires_grad_(False)
                parameter.grad = None


def losses(base: BaseModel, task: Task, examples: Sequence[Example], steps: int) -> Iterator[torch.Tensor]:
    """The mean loss of a batch for each step, drawn alike at each call."""
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(examples), (_BATCH,), generator=order).tolist()
        yield task.losses(base.model, task.collate([examples[i] for i in at], base.processor)).mean()
