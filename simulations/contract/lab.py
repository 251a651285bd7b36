"""Adapters on tiny models, with batches of uneven texts: what the tests of methods and of privacy stand on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...core.adapter import AdapterState
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig, TaskConfig
from ...core.tasks import Batch, Task, create_task
from ...methods import AttachedAdapter, attach
from ...privacy.clipping import create_engine
from ...privacy.noise import RandomStream
from ...strategies.contract import BrokenContractError

TEXT, IMAGE, LM = "sequence-classification", "image-classification", "causal-lm"
LABELS = ("a", "b", "c")
#: Words a record has: uneven, so that there is padding, and longer than the prefix.
LENGTHS = (3, 11, 1, 6, 8)
Case = tuple[str, str, str]


def pixels(length: int, seed: int) -> Image.Image:
    """A random image (its size hangs on ``length``; the processor brings it to the model's)."""
    side = 8 + length
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


class Lab:
    """Loads each tiny model once and hands out copies."""

    lengths = LENGTHS

    def __init__(self, folder: Callable[..., str], text: Callable[[int, int], str]) -> None:
        self._folder, self._text = folder, text
        self._bases: dict[tuple[str, str], BaseModel] = {}

    def task(self, name: str) -> Task:
        return create_task(TaskConfig(name=name, labels=LABELS))

    def base(self, family: str, task: str) -> BaseModel:
        """A base model of one's own to attach to, equal at every call."""
        if (family, task) not in self._bases:
            config = TaskConfig(name=task, labels=LABELS)
            self._bases[family, task] = create_task(config).load(self._folder(family, task), config, seed=5)
        base = self._bases[family, task]
        return replace(base, model=copy.deepcopy(base.model))

    def attach(self, family: str, task: str, method: str, *, seed: int = 1, **settings: Any) -> AttachedAdapter:
        config = MethodConfig(name=method, **{"rank": 4, "alpha": 8.0, "virtual_tokens": 3, **settings})
        return attach(self.base(family, task), config, self.task(task), seed)

    def records(self, family: str, task: str, lengths: Sequence[int], seed: int = 0) -> list[Any]:
        """One encoded example for each length in words; labels go round."""
        make = pixels if task == IMAGE else self._text
        inputs = [make(length, 1000 * seed + i) for i, length in enumerate(lengths)]
        labels = [(seed + i) % len(LABELS) for i in range(len(lengths))]
        return list(self.task(task).encode(inputs, labels, self.base(family, task).processor))

    def batch(self, family: str, task: str, records: Sequence[Any]) -> Batch:
        return self.task(task).collate(records, self.base(family, task).processor)

    @staticmethod
    def losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each example in the model's own precision; the tasks' losses go through float32."""
        kind = next(model.parameters()).dtype
        inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs).logits
        if "labels" in batch:
            return F.cross_entropy(logits, batch["labels"], reduction="none")
        ids, mask = batch["input_ids"], batch["attention_mask"][:, 1:]
        logits = logits[:, -ids.shape[1] :][:, :-1]
        tokens = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (tokens * mask).sum(1) / mask.sum(1)

    @staticmethod
    def shaken(adapter: AttachedAdapter, seed: int = 0, by: float = 0.1) -> AdapterState:
        """A state without zeros, written into ``adapter``: LoRA's B starts at zero and would hide errors."""
        random = np.random.default_rng(seed)
        fresh = adapter.read()
        state = AdapterState(
            adapter.spec, {n: (a + by * random.standard_normal(a.shape)).astype(a.dtype) for n, a in fresh.items()}
        )
        adapter.write(state)
        return state

    def double(self, case: Case, **settings: Any) -> AttachedAdapter:
        """A shaken adapter in float64, so that an error of a rule cannot hide behind rounding."""
        adapter = self.attach(*case, **settings)
        self.shaken(adapter)
        adapter.model.double()
        return adapter

    def rows(self, adapter: AttachedAdapter, case: Case, records: Sequence[Any]) -> torch.Tensor:
        """The naive twin: the gradient of each record by itself, without padding, engine or neighbours."""
        parameters = list(adapter.trainables().values())
        return self.gradients(
            parameters, (self.losses(adapter.model, self.batch(*case[:2], [r])).sum() for r in records)
        )

    def add(
        self,
        engine: Any,
        adapter: AttachedAdapter,
        case: Case,
        records: Sequence[Any],
        scale: Sequence[float] = (),
        units: Sequence[int] | None = None,
    ) -> None:
        """One physical batch; ``scale`` multiplies the losses."""
        engine.expect(len(records))
        losses = self.losses(adapter.model, self.batch(*case[:2], records))
        if scale:
            losses = losses * torch.tensor(scale, dtype=losses.dtype)
        engine.add(losses, None if units is None else torch.tensor(units))

    def summed(
        self,
        adapter: AttachedAdapter,
        case: Case,
        batches: Sequence[Sequence[Any]],
        clip: float,
        scale: Sequence[float] = (),
        engine: str = "exact",
    ) -> torch.Tensor:
        """What an engine adds up over ``batches``; ``scale`` is for the first."""
        with create_engine(engine, adapter.model, adapter.trainables(), clip) as made:
            for index, batch in enumerate(batches):
                self.add(made, adapter, case, batch, scale if index == 0 else ())
            made.release(0.0, 1.0, RandomStream.seeded_not_private("lab"))
            return self.flat(adapter.trainables())

    @staticmethod
    def flat(trainables: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """All gradients in one vector."""
        parts = []
        for name, parameter in trainables.items():
            if parameter.grad is None:
                raise BrokenContractError(f"{name} has no gradient")
            parts.append(parameter.grad.reshape(-1).clone())
        return torch.cat(parts)

    @staticmethod
    def gradients(parameters: Sequence[nn.Parameter], losses: Iterable[torch.Tensor]) -> torch.Tensor:
        """The gradient of each loss, by a backward pass of its own; shape (losses, P)."""
        found = []
        for loss in losses:
            parts = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
            found.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for p, g in zip(parameters, parts, strict=True)
                    ]
                )
            )
        return torch.stack(found)

    @staticmethod
    def clipped(rows: torch.Tensor, clip: float) -> torch.Tensor:
        """Sum of rows, each scaled down to norm ``clip``."""
        total = torch.zeros_like(rows[0])
        for row in rows:
            norm = float(row.norm())
            total += row * (clip / norm if norm > clip else 1.0)
        return total

    @staticmethod
    def close(got: torch.Tensor, want: torch.Tensor, relative: float = 1e-9) -> None:
        off = float((got - want).norm())
        if got.dtype != want.dtype or not float(want.norm()) > 0 or not off <= relative * float(want.norm()):
            raise BrokenContractError(f"{off:.3g} apart, where {relative:g} of {float(want.norm()):.3g} is allowed")

    @staticmethod
    def checkpointed(adapter: AttachedAdapter, *, reentrant: bool) -> list[tuple[nn.Module, bool]]:
        """Switch checkpointing on without dropout; the list fills with each run of an inner module, and its grad mode.

        A reentrant segment first runs without gradient; any segment runs twice.
        """
        model: Any = adapter.model
        # The second run of a layer would find the keys of the first in the cache.
        model.get_base_model().config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        runs: list[tuple[nn.Module, bool]] = []
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
                for inner in module.modules():
                    inner.register_forward_hook(lambda m, *_: runs.append((m, torch.is_grad_enabled())))
        return runs
