"""Local evaluation: what the adapter gets right of each of a site's held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.tasks import Example
from ..privacy.release import Scores
from .resident import Resident
from .trainer import autocast, by_length, to_device


def evaluate(resident: Resident, state: AdapterState, examples: Sequence[Example], config: RunConfig) -> Scores:
    """Scores of the adapter ``state`` on each of ``examples``, in their order. They must not leave the site as such."""
    resident.adapter.write(state)
    resident.adapter.model.eval()
    found = {key: np.zeros(len(examples)) for key in ("examples", "correct", "loss_sum")}
    numbered = [{**example, "at": at} for at, example in enumerate(examples)]
    with torch.inference_mode(), autocast(config.train, resident.device):
        for batch in by_length(numbered, range(len(numbered)), config.evaluate.batch_size):
            tensors = to_device(resident.task.collate(batch, resident.base.processor), resident.device)
            where = [example["at"] for example in batch]
            for key, values in resident.task.counts(resident.adapter.model, tensors).items():
                found[key][where] = values.double().cpu().numpy()
    return Scores(**found)
