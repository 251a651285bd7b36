"""Which trainings can share their passes."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from ...methods import Steps
from ...privacy.engine.exact import MEMORY
from ..trainer import Lesson

#: A site that trains more numbers than this keeps the processor busy by itself, and stacks of them take memory.
_MOST = 2**22

#: Models that turned out not to be fit, by whether the training was private, with the reason.
_unfit: WeakKeyDictionary[nn.Module, dict[bool, str]] = WeakKeyDictionary()


def why_alone(lesson: Lesson) -> str:
    """Why a training cannot share its passes with others; empty where it can."""
    train, private = lesson.config.train, lesson.plan is not None
    if train.precision == "fp16":
        return "train.precision fp16 scales the loss of each site by itself"
    if train.gradient_checkpointing:
        return "train.gradient_checkpointing runs layers a second time"
    if lesson.resident.adapter.steps is not Steps:
        return f"method {lesson.config.method.name} has work of its own between the steps"
    if train.base_dropout or lesson.config.method.dropout:
        return "dropout draws from one generator, whose order is the site's own"
    if private and lesson.config.privacy.engine != "exact":
        return f"privacy.engine {lesson.config.privacy.engine} clips one site at a time"
    if lesson.noise is not None:
        return "correlated noise is handed out once, and a pass that breaks off begins again"
    parameters = [tensor for tensor in lesson.state.spec.tensors if tensor.parameter and tensor.policy != "freeze"]
    numbers = sum(lesson.state[tensor.name].size for tensor in parameters)
    if numbers > _MOST:
        return f"it trains more than {_MOST / 1e6:.0f} million numbers"
    if private and 8 * numbers * train.micro_batch > MEMORY:
        return "the gradients of a site's examples fill the memory by themselves"
    if len({tensor.dtype for tensor in parameters}) > 1:
        return "its tensors are of more than one precision"
    return _unfit.get(lesson.resident.adapter.model, {}).get(private, "")


def unfit(lesson: Lesson, why: str) -> None:
    """Remember that the model of ``lesson`` cannot be shared."""
    _unfit.setdefault(lesson.resident.adapter.model, {})[lesson.plan is not None] = why


def fitting_groups(lessons: Sequence[Lesson]) -> list[list[int]]:
    """The positions of ``lessons`` that can train in one, together; each alone where it can share with none."""
    groups: list[list[int]] = []
    for place, lesson in enumerate(lessons):
        for group in groups:
            if not why_alone(lesson) and _alike(lessons[group[0]], lesson):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _alike(first: Lesson, second: Lesson) -> bool:
    """Whether two trainings see the same base model, and nothing differs in it but what trains."""
    if first.resident is not second.resident or why_alone(first) or (first.plan is None) != (second.plan is None):
        return False
    if first.config.train.precision != second.config.train.precision:
        return False
    ours, theirs = first.state, second.state
    if ours is theirs:
        return True
    if ours.spec is not theirs.spec and ours.spec != theirs.spec:
        return False
    fixed = [tensor.name for tensor in ours.spec.tensors if tensor.policy == "freeze" and tensor.name in ours]
    return all(
        name in theirs and (ours[name] is theirs[name] or np.array_equal(ours[name], theirs[name])) for name in fixed
    )
