"""One site's part in a training of several: what it draws, in the order in which it would alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core.profile import section
from ...core.tasks import Example
from ...privacy.adaptive import adapted
from ...privacy.engine.clippedsum import ClippedSum
from ...privacy.engine.sites import Stacks
from ...privacy.sampling import shuffled_batches
from ..trainer import Course, Lesson, Sampler, by_length, by_unit, randomness


@dataclass(frozen=True)
class Micro:
    """Examples of one site that pass together. ``units``: of each its privacy unit, under privacy."""

    student: Student
    examples: list[Example]
    units: np.ndarray | None
    #: Over how many examples of the step the loss is averaged, without privacy.
    count: int = 1

    @property
    def shape(self) -> tuple[int, bool]:
        """How long its examples are padded to, and whether there is padding at all: a model may ask for either."""
        lengths = [example["length"] for example in self.examples]
        return max(lengths), min(lengths) < max(lengths)


class Student:
    """A lesson under way, in row ``place`` of the stacks.

    ``failed`` holds what went wrong in it, which ends it and nobody else's.
    """

    def __init__(self, lesson: Lesson, place: int, stacks: Stacks) -> None:
        config, plan = lesson.config, lesson.plan
        self.lesson, self.place = lesson, place
        self.steps = config.train.local_steps
        self.losses: list[float] = []
        self.loss = 0.0
        self.failed: Exception | None = None
        self._stream = randomness(plan, config, lesson.site, lesson.round, lesson.key)
        self._stream.words(1)  # what seeds the dropout of a training alone
        self._stacks = stacks
        self.course: Course | None = None
        if lesson.rule is not None:
            self.course = Course(lesson.rule, lesson.state, stacks.leaves(place))
        if plan is None:
            self._batches = shuffled_batches(len(lesson.examples), config.train.batch_size, self._stream)
        else:
            self._sampler = Sampler(plan, lesson.groups, lesson.keys, self._stream)
            self.sum = ClippedSum(lesson.clip or plan.clip)

    @property
    def names(self) -> tuple[str, ...]:
        """What trains at the step that has begun."""
        return tuple(self._stacks.parameters if self.course is None else self.course.active)

    def begin(self, step: int, size: int) -> list[Micro]:
        """What the step trains on, at most ``size`` examples at a time."""
        lesson, plan = self.lesson, self.lesson.plan
        if self.course is not None:
            self.course.changes(step)
        with section("data"):
            if plan is None:
                chosen = next(self._batches)
                self.loss = 0.0
                return [Micro(self, micro, None, len(chosen)) for micro in by_length(lesson.examples, chosen, size)]
            sample = self._sampler.sample(plan.first_step + step)
            return [Micro(self, micro, units) for micro, units in by_unit(lesson.examples, sample, size)]

    def gradients(self) -> dict[str, nn.Parameter]:
        """The site's own parameters that train, with what was gathered for them as their ``grad``."""
        own: dict[str, nn.Parameter] = {}
        for name in self.names:
            parameter = self._stacks.parameters[name]
            own[name] = self._stacks.leaf(self.place, parameter)
            own[name].grad = self._stacks.gradient(self.place, parameter)
        return own

    def release(self, step: int) -> None:
        """Clipped and noised, the gradients of the step; an empty sample still releases its noise."""
        plan = self.lesson.plan
        if plan is None:
            return
        counted = (self.sum.within, self.sum.over) if plan.clip_quantile else ()
        noise = plan.noise_for(self._stream, plan.first_step + step)
        parameters = [self._stacks.parameters[name] for name in self.names]
        size = sum(parameter.numel() for parameter in parameters)
        noisy = self.sum.release(plan.gradient_noise, plan.expected_batch, noise, size, self._stacks.values)
        if len(parameters) == len(self._stacks.parameters):
            self._stacks.gradients[self.place] = noisy
        else:
            for parameter, part in zip(parameters, noisy.split([p.numel() for p in parameters]), strict=True):
                self._stacks.gradient(self.place, parameter).copy_(part.view_as(parameter))
        if counted:
            self.sum.clip = adapted(
                self.sum.clip,
                *counted,
                quantile=plan.clip_quantile,
                rate=plan.clip_rate,
                count_noise=plan.count_noise,
                expected=plan.expected_batch,
                stream=self._stream,
            )

    @property
    def next_clip(self) -> float | None:
        plan = self.lesson.plan
        return self.sum.clip if plan is not None and plan.clip_quantile else None

    def units_of(self, micro: Micro, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The losses of a micro-batch as they are clipped, and the unit of each where a unit may give several."""
        plan = self.lesson.plan
        if plan is None or plan.records_per_patient == 1 or micro.units is None:
            return losses, None
        if plan.patient_gradient == "mean":
            # The gradient is linear in the loss: the mean of a patient's gradients is the sum of these.
            losses = losses / torch.from_numpy(np.bincount(micro.units)[micro.units]).to(losses)
        return losses, torch.from_numpy(micro.units).to(losses.device)


def row_of(stacks: Stacks, place: int, values: Mapping[str, Any]) -> None:
    """Write the tensors of one site into its row."""
    for name, parameter in stacks.parameters.items():
        array = values[name]
        stacks.of(parameter)[place] = torch.from_numpy(array.copy() if not array.flags.writeable else array)
