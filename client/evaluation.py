"""Local evaluation: counts over a site's held-out records, which add up over sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.tasks import Example
from .resident import Resident
from .trainer import autocast, by_length, to_device


def evaluate(
    resident: Resident, state: AdapterState, examples: Sequence[Example], config: RunConfig
) -> dict[str, float]:
    """``examples``, ``correct`` and ``loss_sum`` of the adapter ``state`` on ``examples``."""
    resident.adapter.write(state)
    resident.adapter.model.eval()
    totals = {"examples": 0.0, "correct": 0.0, "loss_sum": 0.0}
    with torch.inference_mode(), autocast(config.train, resident.device):
        for batch in by_length(examples, range(len(examples)), config.evaluate.batch_size):
            tensors = to_device(resident.task.collate(batch, resident.base.processor), resident.device)
            for key, value in resident.task.counts(resident.adapter.model, tensors).items():
                totals[key] += value
    return totals
