"""Training several sites at once: each step's passes take the batches of all of them through the base model together.

What a site draws, clips, noises and steps by is its own and in its own order, so that the adapter that comes out is the
one that the site alone would have trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.lr_scheduler import LambdaLR

from ...core.adapter import AdapterState
from ...core.errors import UserError, is_out_of_memory, one_line
from ...core.profile import section
from ...core.tasks import Batch
from ...privacy.engine.sites import Part, Pass, Stacks
from ...privacy.engine.together import SitesRows, SitesSums
from ..devicememory import PhysicalBatch, room
from ..trainer import (
    Lesson,
    Trained,
    autocast,
    learning_rate_factor,
    optimizer_of,
    require_memory,
    to_device,
)
from .fitting import unfit
from .heap import keep_freed
from .student import Micro, Student, row_of

#: Bytes that a pass may keep for its backward on a CPU: with more it is slower, for want of cache.
_PASS = 2**26
#: How far a pass of several sites may lie from a site's own before the model counts as unfit for it.
_TOLERANCE = 1e-3

# What is known of a model: bytes that a position of an example leaves for the backward pass, and what was held against
# sites alone.
_bytes: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
_checked: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


class CannotShareError(Exception):
    """These sites cannot train in one; nothing was released, and each can begin again alone."""


def train_in_one(lessons: Sequence[Lesson]) -> list[Trained | Exception]:
    """The result of each of ``lessons``, which :func:`~.fitting.fitting_groups` has put together.

    Raises :class:`CannotShareError` where the model turns out not to be fit for it, or memory runs out.
    """
    keep_freed()
    try:
        cohort = _Cohort(lessons)
        try:
            return cohort.train()
        finally:
            cohort.close()
    except Exception as error:
        raise CannotShareError(one_line(error)) from error


class _Cohort:
    def __init__(self, lessons: Sequence[Lesson]) -> None:
        first = lessons[0]
        self._first, self._config = first, first.config
        self._private = first.plan is not None
        self._resident, self._model = first.resident, first.resident.adapter.model
        adapter = self._resident.adapter
        adapter.adopt(first.state.spec)
        adapter.write(first.state)
        for lesson in lessons:
            require_memory(
                self._resident, lesson.examples, lesson.config, private=self._private, on_smaller=lesson.on_smaller
            )
        self._parameters = adapter.trainables()
        self._stacks = Stacks(self._parameters, len(lessons))
        for place, lesson in enumerate(lessons):
            if place and lesson.state is lessons[place - 1].state:
                self._stacks.values[place] = self._stacks.values[place - 1]
            else:
                row_of(self._stacks, place, lesson.state)
        self._students = [Student(lesson, place, self._stacks) for place, lesson in enumerate(lessons)]
        self._optimisers = _Optimisers(self._students, self._stacks)
        self._engines: dict[tuple[str, ...], SitesRows | SitesSums] = {}
        self._engine: SitesRows | SitesSums | None = None
        self._names: tuple[str, ...] = ()
        #: Examples that one site may have in a pass, and bytes that a pass of several may keep for its backward.
        self._least = self._size(first)
        self._budget = room(self._resident.device) / 4
        if self._resident.device.type == "cpu":
            self._budget = min(self._budget, _PASS)

    def close(self) -> None:
        self._use(())
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        self._resident.adapter.write(self._first.state)

    def train(self) -> list[Trained | Exception]:
        for step in range(max(student.steps for student in self._students)):
            going = self._well([student for student in self._students if step < student.steps])
            if not going:
                break
            if not self._private:
                self._stacks.gradients.fill_(-0.0)
            queues = [
                self._guarded(student, student.begin, step, self._size(student.lesson)) or [] for student in going
            ]
            # A site's micro-batches follow one another, as they are added up when it is alone.
            for number in range(max(map(len, queues))):
                for passing in self._passes([queue[number] for queue in queues if number < len(queue)]):
                    self._pass(passing)
            for student in self._well(going):
                self._guarded(student, student.release, step)
            with section("optimizer"):
                self._optimisers.step(step)
            for student in self._well(going):
                self._guarded(student, self._told, student, step)
        return [student.failed or self._result(student) for student in self._students]

    @staticmethod
    def _well(students: Sequence[Student]) -> list[Student]:
        return [student for student in students if student.failed is None]

    def _guarded(self, student: Student, do: Callable[..., Any], *args: Any) -> Any:
        """What ``do`` gives; what goes wrong in it ends this student's training alone."""
        try:
            return do(*args)
        except Exception as error:
            student.failed = error
            return None

    def _size(self, lesson: Lesson) -> int:
        """How many examples of a site pass at a time."""
        asked = lesson.config.train.micro_batch
        setting = "train.micro_batch"
        own = PhysicalBatch(lesson.resident, lesson.config, setting, asked, lesson.on_smaller, private=self._private)
        return own.size

    def _told(self, student: Student, step: int) -> None:
        if self._private:
            student.lesson.on_step(step + 1, None)
        else:
            student.losses.append(student.loss)
            student.lesson.on_step(step + 1, student.loss)

    # --- passes -----------------------------------------------------------------------------------------------------

    def _passes(self, micros: Sequence[Micro]) -> Iterator[list[Micro]]:
        """What goes together: batches of one padded length and the same trained tensors, the small ones first."""

        def key(micro: Micro) -> tuple[Any, ...]:
            return micro.student.names, micro.shape

        for (_, (length, _)), alike in groupby(sorted(micros, key=key), key):
            most, rows = self._most_rows(length), 0
            together: list[Micro] = []
            for micro in sorted(alike, key=lambda micro: (len(micro.examples), micro.student.place)):
                if together and rows + len(micro.examples) > most:
                    yield together
                    together, rows = [], 0
                together.append(micro)
                rows += len(micro.examples)
            yield together

    def _most_rows(self, length: int) -> int:
        """As many as one site may have in a pass, and more where little memory is taken."""
        if self._model not in _bytes:
            return self._least
        most = max(self._least, int(self._budget / (_bytes[self._model] * length)))
        return min(most, self._engine.most_rows) if isinstance(self._engine, SitesRows) else most

    def _use(self, names: tuple[str, ...]) -> None:
        """Have the tensors called ``names`` train, and the others keep each site's values."""
        if names == self._names:
            return
        if self._engine is not None:
            self._engine.__exit__(None, None, None)
        self._engine, self._names = None, names
        if not names:
            return
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in names)
        if names not in self._engines:
            active = {name: self._parameters[name] for name in names}
            kind = SitesRows if self._private else SitesSums
            self._engines[names] = kind(self._model, active, self._stacks)
        self._engine = self._engines[names]
        self._engine.__enter__()
        self._hide()

    def _hide(self) -> None:
        """Whatever still used the model's own tensors, and not the sites', would now give NaN."""
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.fill_(torch.nan)

    def _pass(self, micros: list[Micro]) -> None:
        """One forward and backward pass, of which each site's gradients remain."""
        batch = self._collated(micros)
        if batch is None:
            return
        self._use(micros[0].student.names)
        passing = Pass([(micro.student.place, len(micro.examples)) for micro in micros])
        key = (self._names, self._private)
        if key in _checked.get(self._model, ()):
            self._add(self._losses(batch, passing), passing, micros)
            return
        try:
            with _Saved(self._model) as saved:
                losses = self._losses(batch, passing)
            self._add(losses, passing, micros)
            ends = {passing.parts[0], passing.parts[-1]}
            told = [self._held_against_alone(batch, losses.detach(), part, micros) for part in ends]
        except Exception as error:
            if not is_out_of_memory(error):
                unfit(self._first, f"{type(self._first.resident.base.model).__name__}: {error}")
            raise
        length = micros[0].shape[0]
        _bytes[self._model] = max(1.0, saved.bytes / (passing.batch * length))
        if all(told):
            _checked.setdefault(self._model, set()).add(key)

    def _collated(self, micros: list[Micro]) -> Batch | None:
        """The examples of all, padded; who has one that cannot be read fails, and the others go on without."""
        task, processor = self._resident.task, self._resident.base.processor
        with section("data"):
            while micros:
                try:
                    batch = task.collate([example for micro in micros for example in micro.examples], processor)
                    return to_device(batch, self._resident.device)
                except Exception:
                    for micro in micros:
                        self._guarded(micro.student, task.collate, micro.examples, processor)
                    left = [micro for micro in micros if micro.student.failed is None]
                    if len(left) == len(micros):
                        raise
                    micros[:] = left
        return None

    def _losses(self, batch: Batch, passing: Pass) -> torch.Tensor:
        if isinstance(self._engine, SitesRows):
            self._engine.begin(passing)
        elif self._engine is not None:
            self._engine.expect(passing)
        with section("forward"), autocast(self._config.train, self._resident.device):
            return self._resident.task.losses(self._model, batch)

    def _add(self, losses: torch.Tensor, passing: Pass, micros: Sequence[Micro]) -> None:
        if isinstance(self._engine, SitesRows):
            own = [
                micro.student.units_of(micro, losses[part.start : part.stop])
                for micro, part in zip(micros, passing.parts, strict=True)
            ]
            if any(units is not None for _, units in own):
                losses = torch.cat([losses for losses, _ in own])
            places = [part.site for part in passing.parts]
            sums = {micro.student.place: micro.student.sum for micro in micros}
            self._engine.add_for(losses, sums, dict(zip(places, (units for _, units in own), strict=True)))
            return
        if self._engine is None:
            raise RuntimeError("no engine is in use")
        counts = losses.new_tensor([micro.count for micro in micros])
        rows = torch.tensor([part.rows for part in passing.parts], device=losses.device)
        self._engine.add(losses, (1 / counts).repeat_interleave(rows))
        found = losses.detach()
        sums_of = torch.cat([found[run.start : run.stop].view(len(run.sites), -1).sum(1) for run in passing.runs])
        for micro, mean in zip(micros, (sums_of / counts).tolist(), strict=True):
            micro.student.loss += mean

    # --- is the model fit for it? -----------------------------------------------------------------------------------

    def _held_against_alone(self, batch: Batch, losses: torch.Tensor, part: Part, micros: Sequence[Micro]) -> bool:
        """The first pass of a model: a site's losses, and without privacy its gradients, must be those of its own pass.

        Privacy holds the rows against a backward pass of their own. False: the site has diverged, and nothing is told.
        """
        own = slice(part.start, part.stop)
        alone = {key: value[own] for key, value in batch.items()}
        stacks, parameters = self._stacks, [self._parameters[name] for name in self._names]
        try:
            with torch.no_grad():
                for parameter in self._parameters.values():
                    parameter.copy_(stacks.of(parameter)[part.site])
            with autocast(self._config.train, self._resident.device):
                want = self._resident.task.losses(self._model, alone)
            _require_near("its losses", losses[own], want.detach())
            if self._private or not bool(torch.isfinite(want).all()):
                return bool(torch.isfinite(want).all())
            count = next(micro.count for micro in micros if micro.student.place == part.site)
            wanted = torch.autograd.grad(want.sum() / count, parameters, allow_unused=True)
            got = [stacks.gradients_of(parameter)[part.site] for parameter in parameters]
            for name, gradient in zip(self._names, wanted, strict=True):
                if gradient is None:
                    raise UserError(f"tensor {name} takes no part in this batch")
            flat = [torch.cat([g.reshape(-1) for g in each]) for each in (got, wanted)]
            _require_near("its gradients", *flat)
            return True
        finally:
            self._hide()

    # --- the end ----------------------------------------------------------------------------------------------------

    def _result(self, student: Student) -> Trained | Exception:
        lesson = student.lesson
        if student.course is not None:
            student.course.end()
        row = self._stacks.values[student.place].to("cpu", copy=True).numpy()
        row.flags.writeable = False
        tensors: dict[str, np.ndarray] = dict(lesson.state)
        at = 0
        for name, parameter in self._parameters.items():
            tensors[name] = row[at : at + parameter.numel()].reshape(tuple(parameter.shape))
            at += parameter.numel()
        state = AdapterState(lesson.state.spec, tensors)
        try:
            state.require_finite()
        except UserError as error:
            return UserError(f"training diverged in round {lesson.round}: {error}; lower train.lr")
        losses = student.losses
        return Trained(state, student.steps, sum(losses) / len(losses) if losses else None, student.next_clip)


class _Optimisers:
    """The optimizers of all: one over the rows of sites with the same settings, one for each with a rule of its own."""

    def __init__(self, students: Sequence[Student], stacks: Stacks) -> None:
        self._stacks = stacks
        self._own: list[tuple[Student, torch.optim.Optimizer, LambdaLR]] = []
        self._common: list[tuple[list[Student], slice, torch.optim.Optimizer, LambdaLR]] = []
        for key, alike in groupby(students, self._settings):
            same = list(alike)
            if key is None:
                for student in same:
                    leaves = stacks.leaves(student.place)
                    self._own.append((student, *_optimiser(student.lesson, leaves.values())))
            else:
                rows = slice(same[0].place, same[-1].place + 1)
                self._common.append((same, rows, *_optimiser(same[0].lesson, [nn.Parameter(stacks.values[rows])])))

    @staticmethod
    def _settings(student: Student) -> Any:
        lesson = student.lesson
        return None if student.course is not None else (lesson.config.train, lesson.config.total_steps, lesson.round)

    def step(self, step: int) -> None:
        for student, optimizer, schedule in self._own:
            if student.failed is None and step < student.steps:
                try:
                    self._step_of(student, step, optimizer, schedule)
                except Exception as error:
                    student.failed = error
        for students, rows, optimizer, schedule in self._common:
            if step >= students[0].steps:
                continue
            for student in students:
                self._limit(student)
            optimizer.param_groups[0]["params"][0].grad = self._stacks.gradients[rows]
            optimizer.step()
            schedule.step()

    def _step_of(self, student: Student, step: int, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        own = student.gradients()
        self._limit(student)
        if student.course is not None:
            student.course.direct(step)
        optimizer.step()
        schedule.step()
        for parameter in own.values():
            parameter.grad = None

    def _limit(self, student: Student) -> None:
        most = student.lesson.config.train.max_grad_norm
        if most and student.lesson.plan is None:
            with section("clip"):
                nn.utils.clip_grad_norm_(student.gradients().values(), most)


def _optimiser(lesson: Lesson, parameters: Any) -> tuple[torch.optim.Optimizer, LambdaLR]:
    config = lesson.config
    settings, first = config.train, (lesson.round - 1) * config.train.local_steps
    optimizer = optimizer_of(settings, parameters)
    factor = lambda step: learning_rate_factor(settings, first + step, config.total_steps)  # noqa: E731
    return optimizer, LambdaLR(optimizer, factor)


class _Saved:
    """Counts the bytes that are kept for the backward pass, each storage once, the model's own not."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _require_near(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise :class:`UserError` unless both are equal but for rounding; of a site that has diverged nothing is told."""
    if not bool(torch.isfinite(want).all()):
        if bool(torch.isfinite(got).all()):
            raise UserError(f"{what} are others than alone")
        return
    if not float((got - want).norm()) <= _TOLERANCE * float(want.norm()) + 1e-6:
        raise UserError(f"{what} are others than alone")
