"""Fit a Laplace approximation to a trained adapter by public records, and predict with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...client.data import read_records, split
from ...client.resident import Resident, resident
from ...client.trainer import to_device
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Batch, Example
from ...core.tasks.classification import Classification
from ...methods.laplace import PRECISIONS, Laplace, chances, curvature, laplace, same_length
from ...methods.peftfolder import locate
from ..public import PUBLIC, public_config, require_public
from .calibration import Calibration, calibration

#: Called with (what is done, of how many batches).
Told = Callable[[int, int], None]
#: Records in one pass: of each, and of each label, a Jacobian by every factor is held.
_BATCH = 8
#: Of so many records one chooses the prior's precision, and the others make the curvature; the paper's fifth.
_EACH = 5
_METHODS = ("laplace-lora", "lora", "rslora")


@dataclass(frozen=True)
class Fitted:
    """An adapter with its posterior, and how well it is calibrated on public records that fitted neither.

    ``plain``: by the adapter's own values; ``sampled``: by ``draws`` of the posterior's predictive.
    """

    model: Resident
    posterior: Laplace
    precision: float
    config: RunConfig
    draws: int
    records: int
    held_out: int
    plain: Calibration
    sampled: Calibration

    def chances(self, examples: Sequence[Example]) -> torch.Tensor:
        """The chance of each label, (n, C), calibrated."""
        return _predicted(self.model, self.posterior, self.config, examples, self.draws, [self.precision])[1][0]


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
    chooses, fits = train[::_EACH], [example for at, example in enumerate(train) if at % _EACH]
    if not fits:
        raise UserError(f"{data}: one record to fit is too few; give some hundreds")
    batches = [_batch(model, fits, places) for places in same_length(fits, _BATCH)]
    found = curvature(model.adapter.model, _scores(model), batches, lambda done: told(done, len(batches)))
    posterior = laplace(found)
    _, tried = _predicted(model, posterior, config, chooses, draws, PRECISIONS)
    losses = [calibration(each.numpy(), _labels(chooses)).loss for each in tried]
    precision = PRECISIONS[losses.index(min(losses))]
    plain, (sampled,) = _predicted(model, posterior, config, held_out, draws, [precision])
    measured = (calibration(each.numpy(), _labels(held_out)) for each in (plain, sampled))
    return Fitted(model, posterior, precision, config, draws, len(train), len(held_out), *measured)


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example["label"] for example in examples])


def _scores(model: Resident) -> Callable[[Batch], torch.Tensor]:
    task: Classification = model.task  # type: ignore[assignment]
    return lambda batch: task.logits(model.adapter.model, batch)


def _batch(model: Resident, examples: Sequence[Example], places: Sequence[int]) -> Batch:
    return to_device(model.task.collate([examples[at] for at in places], model.base.processor), model.device)


def _predicted(
    model: Resident,
    posterior: Laplace,
    config: RunConfig,
    examples: Sequence[Example],
    draws: int,
    precisions: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chances (n, C) by the adapter's own values, and (K, n, C) by its posterior with each of K ``precisions``."""
    labels = len(config.task.labels)
    plain = torch.zeros(len(examples), labels, dtype=torch.float64)
    sampled = torch.zeros(len(precisions), len(examples), labels, dtype=torch.float64)
    for places in same_length(examples, _BATCH):
        batch = _batch(model, examples, places)
        scores, covariances = posterior.predict(model.adapter.model, _scores(model), batch, precisions)
        plain[places] = scores.softmax(-1)
        for found, covariance in zip(sampled, covariances, strict=True):
            found[places] = chances(scores, covariance, draws, config.seed)
    return plain, sampled
