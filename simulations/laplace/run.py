"""Fit a Laplace approximation to a trained adapter by public records, and predict with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...client.data import read_records, split
from ...client.resident import Resident, resident
from ...client.trainer import to_device
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Batch, Example
from ...core.tasks.classification import Classification
from ...methods.laplace import Laplace, chances, curvature, laplace, same_length
from ...methods.peftfolder import locate
from ..public import PUBLIC, public_config, require_public
from .calibration import Calibration, calibration

#: Called with (what is done, of how many batches).
Told = Callable[[int, int], None]
#: Records in one pass: of each, and of each label, a Jacobian by every factor is held.
_BATCH = 8
_METHODS = ("laplace-lora", "lora", "rslora")


@dataclass(frozen=True)
class Fitted:
    """An adapter with its posterior, and how well it is calibrated on public records that fitted neither.

    ``plain``: by the adapter's own values; ``sampled``: by ``draws`` of the posterior's predictive.
    """

    model: Resident
    posterior: Laplace
    config: RunConfig
    draws: int
    records: int
    held_out: int
    plain: Calibration
    sampled: Calibration

    def chances(self, examples: Sequence[Example]) -> torch.Tensor:
        """The chance of each label, (n, C), calibrated."""
        return _predicted(self.model, self.posterior, self.config, examples, self.draws)[1]


def fitted(job: RunConfig, adapter: Path, data: Path, draws: int, told: Told) -> Fitted:
    """The posterior of the adapter in a PEFT folder or run directory, by a part of ``data``; the rest measures it."""
    require_public(job, data)
    config = public_config(job)
    if config.method.name not in _METHODS:
        raise UserError(f"method.name is {config.method.name}: the Laplace approximation is of {', '.join(_METHODS)}")
    records = split(read_records(data, config), config, PUBLIC)
    model = resident(config)
    if not isinstance(model.task, Classification):
        raise UserError(f"task {config.task.name} has no fixed labels: the Laplace approximation is for classification")
    model.adapter.load_peft(locate(adapter))
    train, held_out = (
        model.task.encode(part.inputs, None if part.labels is None else part.labels.tolist(), model.base.processor)
        for part in (records.train, records.held_out)
    )
    batches = [_batch(model, train, places) for places in same_length(train, _BATCH)]
    network = model.adapter.model
    found = curvature(network, _scores(model), batches, lambda done: told(done, len(batches)))
    posterior = laplace(network, found)
    plain, sampled = _predicted(model, posterior, config, held_out, draws)
    labels = torch.tensor([example["label"] for example in held_out]).numpy()
    measured = (calibration(each.numpy(), labels) for each in (plain, sampled))
    return Fitted(model, posterior, config, draws, len(train), len(held_out), *measured)


def _scores(model: Resident) -> Callable[[Batch], torch.Tensor]:
    task: Classification = model.task  # type: ignore[assignment]
    return lambda batch: task.logits(model.adapter.model, batch)


def _batch(model: Resident, examples: Sequence[Example], places: Sequence[int]) -> Batch:
    return to_device(model.task.collate([examples[at] for at in places], model.base.processor), model.device)


def _predicted(
    model: Resident, posterior: Laplace, config: RunConfig, examples: Sequence[Example], draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chances (n, C) by the adapter's own values, and by its posterior."""
    labels = len(config.task.labels)
    plain, sampled = (torch.zeros(len(examples), labels, dtype=torch.float64) for _ in range(2))
    for places in same_length(examples, _BATCH):
        batch = _batch(model, examples, places)
        scores, covariance = posterior.predict(model.adapter.model, _scores(model), batch)
        plain[places] = scores.softmax(-1)
        sampled[places] = chances(scores, covariance, draws, config.seed)
    return plain, sampled
