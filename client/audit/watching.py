"""The real trainer, watched: which records each step saw, and what its optimizer was given.

Nothing of the trainer is copied. The records are seen where the task puts them into a batch, the release where
PyTorch's optimizer takes it up, so that whatever the trainer does wrong in between shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...core.adapter import AdapterState
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Batch, Example, Task
from ...methods import Steps
from ...privacy.clipping import Noise, create_engine
from ...privacy.correlated import CorrelatedNoise, seeded_key_not_private
from ...privacy.plan import PrivacyPlan
from ..resident import Resident
from ..trainer import EngineFactory, require_memory, train


@dataclass(frozen=True)
class Step:
    """One optimizer step: the ``records`` it saw (indices), its noisy sum (P,) in float64, and the clip in force."""

    records: tuple[int, ...]
    released: torch.Tensor
    clip: float


class Silence:
    """Noise that is zero: for looking at what lies beneath it."""

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor)


class Standin:
    """An engine in front of an engine: does as that does, but for what a subclass changes."""

    def __init__(self, engine: Any, trainables: Mapping[str, nn.Parameter]) -> None:
        self.engine = engine
        self.trained = dict(trainables)

    def __enter__(self) -> Any:
        self.engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def clip(self) -> float:
        return float(self.engine.clip)

    @clip.setter
    def clip(self, clip: float) -> None:
        self.engine.clip = clip

    def expect(self, rows: int) -> None:
        self.engine.expect(rows)

    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        self.engine.add(losses, units)

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        self.engine.release(noise_multiplier, expected_batch, noise)


class _Watched(Standin):
    """Remembers the clip of each release, and keeps the noise out of it where asked."""

    def __init__(self, engine: Any, trainables: Mapping[str, nn.Parameter], clips: list[float], silent: bool) -> None:
        super().__init__(engine, trainables)
        self.clips = clips
        self.silent = silent

    def release(self, noise_multiplier: float, expected_batch: float, noise: Noise) -> None:
        self.clips.append(self.engine.clip)
        super().release(noise_multiplier, expected_batch, Silence() if self.silent else noise)


class _WatchedTask:
    """A task that notes which examples go into a batch."""

    def __init__(self, task: Task, note: Callable[[Sequence[Example]], None]) -> None:
        self._task = task
        self._note = note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        self._note(examples)
        return self._task.collate(examples, processor)


@dataclass
class _Notes:
    """What is seen of the step that is being taken, and of those that were."""

    trainables: Mapping[str, nn.Parameter]
    start: Sequence[torch.Tensor]
    index: Mapping[int, int]
    batch: int
    seen: list[int] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def examples(self, examples: Sequence[Example]) -> None:
        for example in examples:
            if id(example) not in self.index:
                raise UserError("the trainer was seen to train on an example that is not one of the site's")
            self.seen.append(self.index[id(example)])

    def optimizer_step(self, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        own = {id(parameter) for parameter in self.trainables.values()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        for parameter, start in zip(self.trainables.values(), self.start, strict=True):
            if not torch.equal(parameter.detach(), start):
                raise UserError("the model moved while it was audited, so its steps cannot be compared")
        flat = [
            torch.zeros(parameter.numel(), dtype=torch.float64)
            if parameter.grad is None
            else parameter.grad.detach().cpu().reshape(-1).double()
            for parameter in self.trainables.values()
        ]
        clip = self.clips[-1] if self.clips else float("nan")
        self.steps.append(Step(tuple(self.seen), torch.cat(flat) * self.batch, clip))
        self.seen = []


def watch(
    resident: Resident,
    state: AdapterState,
    examples: Sequence[Example],
    groups: Sequence[np.ndarray],
    config: RunConfig,
    plan: PrivacyPlan,
    *,
    site: str,
    keys: Sequence[bytes] = (),
    claimed: PrivacyPlan | None = None,
    silent: bool = False,
    create: EngineFactory = create_engine,
) -> list[Step]:
    """Train as a site does, for ``train.local_steps`` steps, and return what was seen of each.

    The learning rate is set so small that no number of the model moves: what an optimizer makes of a release is post-
    processing. The adapter computes as it does by itself: what its method does at the steps of a training, such as to
    draw the rank of one, would have every step compared with another function. ``keys``: a key of each unit, where they
    come in turn; ``claimed``: the plan that the release is measured by, where another is trained with; ``silent``:
    without noise; ``create``: makes the engine, for the faults of the self-test.
    """
    claimed = claimed or plan
    adapter = resident.adapter
    adapter.adopt(state.spec)
    adapter.write(state)
    trainables = adapter.trainables()
    start = [parameter.detach().clone() for parameter in trainables.values()]
    notes = _Notes(trainables, start, {id(e): i for i, e in enumerate(examples)}, claimed.expected_batch)

    def engine(name: str, model: nn.Module, trained: dict[str, nn.Parameter], clip: float) -> Any:
        return _Watched(create(name, model, trained, clip), trained, notes.clips, silent)

    still = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-30})})
    # What is tried out for the memory's sake takes examples too, and releases nothing.
    require_memory(resident, examples, still, private=True, on_smaller=lambda setting, size, text: None)
    hook = register_optimizer_step_pre_hook(notes.optimizer_step)
    own, adapter.steps = adapter.steps, Steps
    try:
        train(
            replace(resident, task=_WatchedTask(resident.task, notes.examples)),
            state,
            examples,
            groups,
            still,
            site=site,
            round=1,
            plan=plan,
            keys=keys,
            noise=_correlated(plan, config, site),
            create=engine,
        )
    finally:
        adapter.steps = own
        hook.remove()
    return notes.steps


def _correlated(plan: PrivacyPlan, config: RunConfig, site: str) -> CorrelatedNoise | None:
    """The noise of a run of its own, where the plan's is correlated."""
    if plan.bands == 1:
        return None
    seeded = plan.seeded_noise_not_private
    return plan.correlated(seeded_key_not_private(config.seed, site) if seeded else os.urandom(32))
