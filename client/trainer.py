"""Local training of one round: the adapter in, some steps on the site's own records, the adapter out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.adapter import AdapterState
from ..core.config import RunConfig, TrainConfig
from ..core.errors import UserError
from ..core.profile import section
from ..core.tasks import Batch, Example
from ..methods import Steps
from ..privacy.adaptive import adapted
from ..privacy.clipping import ClippedGradients, create_engine
from ..privacy.correlated import CorrelatedNoise
from ..privacy.noise import RandomStream
from ..privacy.plan import PrivacyPlan
from ..privacy.sampling import Sample, draw, shares, shuffled_batches
from ..strategies import LocalRule
from .devicememory import OnSmaller, PhysicalBatch, require_room, told_when_full
from .resident import Resident

#: Called after each step with (step, loss); the loss is for whoever sits at the site and is None under DP.
OnStep = Callable[[int, float | None], None]
#: Makes the engine of a private training, as :func:`~fedgraft.privacy.clipping.create_engine` does.
EngineFactory = Callable[[str, nn.Module, dict[str, nn.Parameter], float], Any]


@dataclass(frozen=True)
class Trained:
    """The result of a round: the whole adapter, steps taken, and the mean training loss where privacy allows it.

    ``clip``: the clipping bound that the next round begins with, where it adapts.
    """

    state: AdapterState
    steps: int
    loss: float | None
    clip: float | None = None


@dataclass(frozen=True)
class Lesson:
    """One site's training of one round: what :func:`train` is given."""

    resident: Resident
    state: AdapterState
    examples: Sequence[Example]
    groups: Sequence[np.ndarray]
    config: RunConfig
    site: str
    round: int
    plan: PrivacyPlan | None
    keys: Sequence[bytes] = ()
    clip: float | None = None
    noise: CorrelatedNoise | None = None
    key: bytes | None = None
    on_step: OnStep = lambda step, loss: None
    rule: LocalRule | None = None
    on_smaller: OnSmaller = lambda setting, size, text: None

    def train(self) -> Trained:
        """Train alone."""
        return train(
            self.resident,
            self.state,
            self.examples,
            self.groups,
            self.config,
            site=self.site,
            round=self.round,
            plan=self.plan,
            keys=self.keys,
            clip=self.clip,
            noise=self.noise,
            key=self.key,
            on_step=self.on_step,
            rule=self.rule,
            on_smaller=self.on_smaller,
        )


def by_length(examples: Sequence[Example], indices: Iterable[int], size: int) -> Iterator[list[Example]]:
    """Batches of ``size`` among ``indices``, shortest first, so that little of a batch is padding."""
    order = sorted(indices, key=lambda index: examples[index]["length"])
    for start in range(0, len(order), size):
        yield [examples[index] for index in order[start : start + size]]


def by_unit(examples: Sequence[Example], sample: Sample, size: int) -> Iterator[tuple[list[Example], np.ndarray]]:
    """The sample in batches of at most ``size`` records, shortest first, and of each record its unit in that batch.

    All records of a unit come in one batch, or it would be clipped in parts.
    """
    members: dict[int, list[int]] = {}
    for record, unit in zip(sample.records.tolist(), sample.units.tolist(), strict=True):
        members.setdefault(unit, []).append(record)
    batch: list[list[int]] = []
    for own in sorted(members.values(), key=lambda own: max(examples[record]["length"] for record in own)):
        if batch and sum(map(len, batch)) + len(own) > size:
            yield _numbered(examples, batch)
            batch = []
        batch.append(own)
    if batch:
        yield _numbered(examples, batch)


def _numbered(examples: Sequence[Example], batch: list[list[int]]) -> tuple[list[Example], np.ndarray]:
    return [examples[record] for own in batch for record in own], np.repeat(
        np.arange(len(batch)), [len(own) for own in batch]
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: tensor.to(device) for key, tensor in batch.items()}


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if config.precision == "bf16" else torch.float16)


def train(
    resident: Resident,
    state: AdapterState,
    examples: Sequence[Example],
    groups: Sequence[np.ndarray],
    config: RunConfig,
    *,
    site: str,
    round: int,
    plan: PrivacyPlan | None,
    keys: Sequence[bytes] = (),
    clip: float | None = None,
    noise: CorrelatedNoise | None = None,
    key: bytes | None = None,
    on_step: OnStep = lambda step, loss: None,
    create: EngineFactory = create_engine,
    rule: LocalRule | None = None,
    on_smaller: OnSmaller = lambda setting, size, text: None,
) -> Trained:
    """Train ``state`` for ``train.local_steps`` steps and return it.

    ``examples``: the site's encoded training records; ``groups``: record indices of each privacy unit. With ``plan``,
    every step is a sample of units, clipped and noised as the plan says; the caller has reserved its steps in the
    ledger. Without, batches are drawn from the run's seed, the site and the round alone, so that the result does
    not depend on the engine or on what ran before. The optimizer starts afresh every round.

    A plan whose units come in turn needs their ``keys``; one with correlated noise that ``noise``; one whose bound
    adapts takes ``clip``, the bound that the last round ended with. ``key``: see :func:`randomness`. ``create`` makes
    the engine that clips; the audit puts one that it watches in its place. ``rule``: what the strategy has the site do
    otherwise; under privacy it sees gradients that are clipped and noised, and where it lets some tensors rest, only
    the others are clipped and noised.

    A step for which memory runs out begins again with the same sample in smaller parts, which ``on_smaller`` is told;
    raises :class:`UserError` when even one example is too much.
    """
    adapter, settings = resident.adapter, config.train
    if plan is not None and settings.precision == "fp16":
        raise UserError("train.precision fp16 needs loss scaling, which would rescale the clipping; use bf16 or fp32")
    adapter.adopt(state.spec)
    adapter.write(state)
    require_memory(resident, examples, config, private=plan is not None, on_smaller=on_smaller)
    trainables = adapter.trainables()
    optimizer = optimizer_of(settings, trainables.values())
    first = (round - 1) * settings.local_steps
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(settings, first + step, config.total_steps))
    stream = randomness(plan, config, site, round, key)
    course = Course(rule, state, trainables)
    own = adapter.steps(adapter, config.method, first=first, total=config.total_steps)
    batch = PhysicalBatch(
        resident, config, "train.micro_batch", settings.micro_batch, on_smaller, private=plan is not None
    )
    with (
        told_when_full(resident.device, config),
        training_mode(adapter.model, config, private=plan is not None),
        torch.random.fork_rng(devices=_cuda(resident.device)),
        closing(own),
    ):
        _seed(int(stream.words(1)[0] >> np.uint64(1)), resident.device)
        if plan is None:
            losses = _plain_steps(resident, course, own, examples, config, batch, stream, optimizer, schedule, on_step)
        else:
            losses, sampler = [], Sampler(plan, groups, keys, stream)
            source = noise if noise is not None else stream
            clip = clip or plan.clip
            with ExitStack() as engine:
                for step in range(settings.local_steps):
                    own.before(step)
                    if course.changes(step):
                        if noise is not None and step:
                            raise UserError(
                                "privacy.bands above 1 needs a strategy that trains the same tensors always"
                            )
                        engine.close()
                        made = create(config.privacy.engine, adapter.model, course.active, clip)
                        gradients = engine.enter_context(made)
                    number = plan.first_step + step
                    with section("data"):
                        sample = sampler.sample(number)
                    batch.run(
                        partial(private_gradients, resident, own, examples, sample, config, gradients, plan),
                        gradients.drop,
                        most=len(sample.records),
                    )
                    counted = (gradients.within, gradients.over) if plan.clip_quantile else ()
                    # An empty sample still releases its noise: skipping the step would tell that it was empty.
                    gradients.release(plan.gradient_noise, plan.expected_batch, plan.noise_for(source, number))
                    if counted:
                        gradients.clip = clip = adapted(
                            gradients.clip,
                            *counted,
                            quantile=plan.clip_quantile,
                            rate=plan.clip_rate,
                            count_noise=plan.count_noise,
                            expected=plan.expected_batch,
                            stream=stream,
                        )
                    with section("optimizer"):
                        course.direct(step)
                        own.gradients(step)
                        optimizer.step()
                        own.after(step)
                        schedule.step()
                    on_step(step + 1, None)
            if not plan.clip_quantile:
                clip = None
    course.end()
    for parameter in trainables.values():
        parameter.grad = None
    trained = adapter.read().filled_from(state)
    try:
        trained.require_finite()
    except UserError as error:
        raise UserError(f"training diverged in round {round}: {error}; lower train.lr") from None
    return Trained(trained, settings.local_steps, sum(losses) / len(losses) if losses else None, clip)


def require_memory(
    resident: Resident, examples: Sequence[Example], config: RunConfig, *, private: bool, on_smaller: OnSmaller
) -> None:
    """Have only as many examples pass at a time as fit into the device's memory, told to ``on_smaller``.

    Raises :class:`UserError` with what a training needs and what there is, when not even one fits.
    """
    model, trainables = resident.adapter.model, resident.adapter.trainables()

    def rehearse(micro: list[Example]) -> None:
        """What a step does to memory, with nothing left of it."""
        with (
            training_mode(model, config, private=private),
            torch.random.fork_rng(devices=_cuda(resident.device)),
            closing(resident.adapter.steps(resident.adapter, config.method, first=0, total=config.total_steps)) as own,
        ):
            if not private:
                scaler = torch.amp.GradScaler(resident.device.type, enabled=False)
                plain_gradients(resident, own, micro, np.arange(len(micro)), config, scaler, len(micro))
            else:
                with create_engine(config.privacy.engine, model, trainables, config.privacy.clip) as gradients:
                    gradients.expect(len(micro))
                    with autocast(config.train, resident.device):
                        batch = to_device(resident.task.collate(micro, resident.base.processor), resident.device)
                        losses = own.losses(resident.task, batch)
                    gradients.rehearse(losses)
        for parameter in trainables.values():
            parameter.grad = None

    require_room(resident, examples, config, rehearse, on_smaller, private=private)


def randomness(
    plan: PrivacyPlan | None, config: RunConfig, site: str, round: int, key: bytes | None = None
) -> RandomStream:
    """What a round's samples, noise and dropout are drawn from.

    That is the run's seed where nothing is private; else ``key``, which is the same where a training that was broken
    off is done again (:mod:`.attempt`), or a fresh one.
    """
    if plan is None or plan.seeded_noise_not_private:
        return RandomStream.seeded_not_private(config.seed, site, round)
    return RandomStream.from_os() if key is None else RandomStream(key)


class Course:
    """Which tensors train at a step, and in what direction, as a strategy's rule says."""

    def __init__(self, rule: LocalRule | None, state: AdapterState, trainables: dict[str, nn.Parameter]) -> None:
        self.rule, self._spec, self._all = rule, state.spec, trainables
        self.active: dict[str, nn.Parameter] = {}
        self._start: Mapping[str, torch.Tensor] = {}
        if rule is not None:
            self._start = {name: parameter.detach().clone() for name, parameter in trainables.items()}

    def changes(self, step: int) -> bool:
        """Let the tensors of ``step`` train and the others rest; whether these are others than before."""
        asked = self.rule.trains(self._spec, step) if self.rule is not None else None
        now = {name: p for name, p in self._all.items() if asked is None or name in asked}
        if not now:
            raise UserError(f"the strategy lets no tensor train at step {step + 1}")
        if now.keys() == self.active.keys():
            return False
        self.active = now
        for name, parameter in self._all.items():
            parameter.requires_grad_(name in now)
            parameter.grad = None
        return True

    def direct(self, step: int) -> None:
        """Put the rule's direction in place of the gradients."""
        if self.rule is None:
            return
        for name, parameter in self.active.items():
            if parameter.grad is not None:
                now = parameter.detach()
                parameter.grad = self.rule.direction(name, parameter.grad, now, self._start[name], step)

    def end(self) -> None:
        for parameter in self._all.values():
            parameter.requires_grad_(True)


class Sampler:
    """Draws the samples of a run's steps as ``plan`` says; ``keys``: a key of each unit, where they come in turn."""

    def __init__(
        self, plan: PrivacyPlan, groups: Sequence[np.ndarray], keys: Sequence[bytes], stream: RandomStream
    ) -> None:
        self._plan, self._groups, self._stream = plan, groups, stream
        self._turn: np.ndarray | None = None
        if plan.slots > 1:
            if len(keys) != len(groups):
                raise ValueError(f"{len(keys)} keys for {len(groups)} units that come in turn")
            self._turn = np.floor(shares(keys, "turn") * plan.slots).astype(np.int64)

    def sample(self, step: int) -> Sample:
        """The sample of ``step``, counted from the run's first."""
        plan = self._plan
        return draw(
            self._groups,
            plan.rate_within_slot,
            self._stream,
            records_per_unit=plan.records_per_patient,
            max_units=plan.max_batch,
            candidates=None if self._turn is None else np.flatnonzero(self._turn == plan.slot(step)),
        )


def _plain_steps(
    resident: Resident,
    course: Course,
    own: Steps,
    examples: Sequence[Example],
    config: RunConfig,
    batch: PhysicalBatch,
    stream: RandomStream,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    on_step: OnStep,
) -> list[float]:
    settings = config.train
    scaler = torch.amp.GradScaler(resident.device.type, enabled=settings.precision == "fp16")
    batches = shuffled_batches(len(examples), settings.batch_size, stream)
    means = []
    for step in range(settings.local_steps):
        own.before(step)
        course.changes(step)
        with section("data"):
            chosen = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = batch.run(
            partial(plain_gradients, resident, own, examples, chosen, config, scaler),
            partial(optimizer.zero_grad, set_to_none=True),
            most=len(chosen),
        )
        scaler.unscale_(optimizer)
        if settings.max_grad_norm:
            with section("clip"):
                nn.utils.clip_grad_norm_(course.active.values(), settings.max_grad_norm)
        with section("optimizer"):
            course.direct(step)
            own.gradients(step)
            scaler.step(optimizer)
            scaler.update()
            own.after(step)
            schedule.step()
        means.append(loss)
        on_step(step + 1, loss)
    return means


def plain_gradients(
    resident: Resident,
    own: Steps,
    examples: Sequence[Example],
    chosen: np.ndarray,
    config: RunConfig,
    scaler: torch.amp.GradScaler,
    size: int,
) -> float:
    """Add the gradient of the mean loss of ``chosen``, ``size`` at a time, to each ``grad``; gives the mean loss."""
    total = 0.0
    for micro in by_length(examples, chosen, size):
        with section("data"):
            batch = to_device(resident.task.collate(micro, resident.base.processor), resident.device)
        with section("forward"), autocast(config.train, resident.device):
            loss = own.losses(resident.task, batch).sum() / len(chosen)
        with section("backward"):
            scaler.scale(loss).backward()
            total += float(loss.detach())
    return total


def private_gradients(
    resident: Resident,
    own: Steps,
    examples: Sequence[Example],
    sample: Sample,
    config: RunConfig,
    gradients: ClippedGradients,
    plan: PrivacyPlan,
    size: int,
) -> None:
    """Add the clipped gradients of ``sample``, ``size`` records at a time, to the step's sum."""
    # Where the rows of a whole batch would not fit into memory, smaller ones add up to the same.
    for micro, units in by_unit(examples, sample, min(size, getattr(gradients, "most_rows", size))):
        with section("data"):
            batch = to_device(resident.task.collate(micro, resident.base.processor), resident.device)
        gradients.expect(len(micro))
        with section("forward"), autocast(config.train, resident.device):
            losses = own.losses(resident.task, batch)
        if plan.records_per_patient == 1:
            gradients.add(losses)
            continue
        if plan.patient_gradient == "mean":
            # The gradient is linear in the loss: the mean of a patient's gradients is the sum of these.
            losses = losses / torch.from_numpy(np.bincount(units)[units]).to(losses)
        gradients.add(losses, torch.from_numpy(units).to(losses.device))


def optimizer_of(settings: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def learning_rate_factor(settings: TrainConfig, step: int, total: int) -> float:
    """Factor on the learning rate at ``step`` of the ``total`` steps of the run: warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    progress = min(progress, 1.0)
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def _seed(seed: int, device: torch.device) -> None:
    """Seed what a training on ``device`` draws from.

    ``torch.manual_seed`` also notes the whole call stack for a GPU that nobody uses: a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


class training_mode:
    """Dropout and checkpointing as configured while training; everything else stays in evaluation mode.

    Normalisation layers never switch: a frozen BatchNorm in training mode would carry batch statistics out of the
    site in its running mean, without noise.
    """

    def __init__(self, model: Any, config: RunConfig, *, private: bool) -> None:
        self.model = model
        self.settings = settings = config.train
        # Opacus's hooks see each layer once only when the recomputation is reentrant.
        self.reentrant = private and config.privacy.engine == "opacus"
        # A model of a few milliseconds a step would notice a walk over all its modules each round.
        self.switches = settings.gradient_checkpointing or config.method.dropout > 0

    def __enter__(self) -> None:
        model, settings = self.model, self.settings
        if settings.base_dropout:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        if self.switches:
            for name, module in model.named_modules():
                if name.endswith("_dropout.default") or (".graft." in name and isinstance(module, nn.Dropout)):
                    module.train()
                if settings.gradient_checkpointing and isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        if settings.gradient_checkpointing:
            # A recomputed layer would append its keys and values to the cache a second time.
            settings_of_base = model.get_base_model().config
            self.use_cache = getattr(settings_of_base, "use_cache", None)
            settings_of_base.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": self.reentrant})
            model.enable_input_require_grads()

    def __exit__(self, *error: object) -> None:
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
            self.model.disable_input_require_grads()
            self.model.get_base_model().config.use_cache = self.use_cache
        if self.switches or self.settings.base_dropout:
            self.model.eval()
