"""Known bugs of private training, put into the real path on purpose: what an audit must catch before it is believed.

Each one changes the engine, the task, the plan or the grouping that the trainer is handed; the trainer itself is the
real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...core.config import RunConfig
from ...core.tasks import Batch, Task
from ...privacy.clipping import Noise, create_engine
from ...privacy.noise import RandomStream
from ...privacy.plan import PrivacyPlan
from ..resident import Resident
from ..trainer import EngineFactory, autocast
from .watching import Silence, Standin

if TYPE_CHECKING:
    from .subject import Subject


def _same(value: Any) -> Any:
    return value


def _plain(config: RunConfig, resident: Resident) -> EngineFactory:
    return create_engine


@dataclass(frozen=True)
class Fault:
    """One way to break the promise. ``caught_by``: the layer that must see it."""

    name: str
    text: str
    caught_by: str
    engine: Callable[[RunConfig, Resident], EngineFactory] = _plain
    task: Callable[[Any], Any] = _same
    plan: Callable[[PrivacyPlan], PrivacyPlan] = _same
    groups: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]] = _same
    #: Whether what is audited can have this fault at all.
    applies: Callable[[Subject], bool] = lambda subject: True


HONEST = Fault("none", "nothing is broken", "")


def _behind(standin: Callable[..., Standin]) -> Callable[[RunConfig, Resident], EngineFactory]:
    """An engine factory that puts ``standin`` in front of the real engine."""

    def for_run(config: RunConfig, resident: Resident) -> EngineFactory:
        def create(name: str, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> Any:
            return standin(create_engine(name, model, trainables, clip), trainables)

        return create

    return for_run


class _HalfNoise(Standin):
    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        super().release(noise_multiplier / 2, expected_batch, noise)


class _NoiseOverBatch(Standin):
    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        super().release(noise_multiplier / expected_batch, expected_batch, noise)


class _Kept:
    """Noise that is drawn once for each shape, and used again."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, noise: Noise, tensor: torch.Tensor) -> torch.Tensor:
        return self.drawn.setdefault(tuple(tensor.shape), noise.normal_like(tensor))


class _Repeated(Standin):
    def __init__(self, engine: Any, trainables: Mapping[str, nn.Parameter]) -> None:
        super().__init__(engine, trainables)
        self.kept = _Kept()

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        super().release(noise_multiplier, expected_batch, _From(lambda tensor: self.kept.of(noise, tensor)))


@dataclass(frozen=True)
class _From:
    """A noise source from a function."""

    normal_like: Callable[[torch.Tensor], torch.Tensor]


class _CleanTensor(Standin):
    """Takes the noise off the largest tensor again."""

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        super().release(noise_multiplier, expected_batch, Silence())
        trained = self.trained
        clean = max(trained, key=lambda name: trained[name].numel())
        for name, parameter in trained.items():
            if name != clean:
                added = noise.normal_like(parameter.detach())
                parameter.grad = _grad(parameter) + noise_multiplier * self.clip * added / expected_batch


class _Uniform(Standin):
    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        def uniform(tensor: torch.Tensor) -> torch.Tensor:
            # The normal distribution function of a normal is uniform; of the same variance here.
            return (torch.special.ndtr(noise.normal_like(tensor)) - 0.5) * 12**0.5

        super().release(noise_multiplier, expected_batch, _From(uniform))


class _OneUnit(Standin):
    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        super().add(losses, torch.zeros(len(losses), dtype=torch.long, device=losses.device))


class _EachRecord(Standin):
    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        super().add(losses)


class _SkipsEmpty(Standin):
    """Releases nothing but zeros where no unit was sampled."""

    def __init__(self, engine: Any, trainables: Mapping[str, nn.Parameter]) -> None:
        super().__init__(engine, trainables)
        self.any = False

    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        self.any = True
        super().add(losses, units)

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        super().release(noise_multiplier, expected_batch, noise if self.any else Silence())
        self.any = False


def _seeded(config: RunConfig, resident: Resident) -> EngineFactory:
    """The noise of every training comes from the experiment's seed."""

    class Seeded(Standin):
        def __init__(self, engine: Any, trainables: Mapping[str, nn.Parameter]) -> None:
            super().__init__(engine, trainables)
            self.stream = RandomStream.seeded_not_private(config.seed)

        def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
            super().release(noise_multiplier, expected_batch, noise if isinstance(noise, Silence) else self.stream)

    return _behind(Seeded)(config, resident)


class _RemembersTask:
    """A task that keeps the batches it was asked the losses of."""

    def __init__(self, task: Any, batches: list[Batch]) -> None:
        self._task = task
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self._batches.append(batch)
        return self._task.losses(model, batch)


class _UnclippedHead:
    """The head trains on its raw gradient, beside the engine; the noise is all there."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._task: Task | None = None

    def task(self, task: Task) -> _RemembersTask:
        self._task = task
        self._batches.clear()
        return _RemembersTask(task, self._batches)

    def engine(self, config: RunConfig, resident: Resident) -> EngineFactory:
        fault = self

        class Unclipped(Standin):
            def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
                # The right step first; then the same batches again under a bound that cuts nothing.
                super().release(noise_multiplier, expected_batch, noise)
                trained, clip = self.trained, self.clip
                right = {name: _grad(parameter).clone() for name, parameter in trained.items()}
                clean = fault._sums(self, config, resident, clip)
                raw = fault._sums(self, config, resident, 1e12)
                fault._batches.clear()
                self.clip = clip
                for name, parameter in trained.items():
                    in_head = any(f".{head}." in name for head in resident.base.head)
                    parameter.grad = right[name] + in_head * (raw[name] - clean[name]) / expected_batch

        return _behind(Unclipped)(config, resident)

    def _sums(self, engine: Standin, config: RunConfig, resident: Resident, clip: float) -> dict[str, torch.Tensor]:
        engine.clip = clip
        for batch in self._batches:
            engine.expect(len(batch["labels"]) if "labels" in batch else len(next(iter(batch.values()))))
            with autocast(config.train, resident.device):
                losses = self._task.losses(resident.adapter.model, batch)  # type: ignore[union-attr]
            engine.engine.add(losses)
        engine.engine.release(0.0, 1.0, Silence())
        return {name: _grad(parameter).clone() for name, parameter in engine.trained.items()}


class _MeanTask:
    """A task whose losses are shares of the mean over the batch: each row hangs on how many others there are."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        losses = self._task.losses(model, batch)
        return losses / len(losses)


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _singles(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.array([index]) for group in groups for index in group]


def _divides(subject: Subject) -> bool:
    return subject.plan.expected_batch > 1


def _has_head(subject: Subject) -> bool:
    return bool(subject.resident.base.head)


def _batches_units(subject: Subject) -> bool:
    return subject.config.train.micro_batch >= 2 * subject.most_records


def _patients(subject: Subject) -> bool:
    return subject.plan.unit == "patient"


def _several(subject: Subject) -> bool:
    return subject.most_records > 1


def _coins(subject: Subject) -> bool:
    plan = subject.plan
    return plan.sampler == "poisson" and plan.slots == 1 and plan.sampling_rate <= 0.5


def _twice_the_rate(plan: PrivacyPlan) -> PrivacyPlan:
    return replace(plan, units=max(plan.expected_batch, plan.units // 2), epsilon=1e9, spent=())


_head = _UnclippedHead()

FAULTS = (
    Fault("half noise", "the noise has half the standard deviation", "noise", engine=_behind(_HalfNoise)),
    Fault(
        "noise over batch",
        "the noise is divided by the batch twice",
        "noise",
        engine=_behind(_NoiseOverBatch),
        applies=_divides,
    ),
    Fault("repeated noise", "every step adds the same noise", "noise", engine=_behind(_Repeated)),
    Fault("one clean tensor", "one tensor gets no noise", "noise", engine=_behind(_CleanTensor)),
    Fault("uniform noise", "the noise is uniform, of the right variance", "noise", engine=_behind(_Uniform)),
    Fault(
        "unclipped head",
        "the head trains on raw gradients",
        "exactness",
        engine=_head.engine,
        task=_head.task,
        applies=_has_head,
    ),
    Fault("batch-mean loss", "losses are a mean over the batch", "exactness", task=_MeanTask, applies=_batches_units),
    Fault(
        "clipped per batch",
        "a batch is clipped as one record, as hooks do a prompt that is built once a batch",
        "exactness",
        engine=_behind(_OneUnit),
        applies=_batches_units,
    ),
    Fault("shared noise", "the noise comes from the run's seed, the same at every site", "noise", engine=_seeded),
    Fault("empty batch skipped", "a step that saw nobody adds no noise", "noise", engine=_behind(_SkipsEmpty)),
    Fault(
        "double sampling",
        "units are sampled twice as often as accounted for",
        "noise",
        plan=_twice_the_rate,
        applies=_coins,
    ),
    Fault(
        "records for patients",
        "each record of a patient counts as a patient",
        "sensitivity",
        groups=_singles,
        applies=_patients,
    ),
    Fault(
        "each record clipped",
        "a patient's records are clipped one by one",
        "exactness",
        engine=_behind(_EachRecord),
        applies=_several,
    ),
)
