"""Local evaluation: what the adapter gets right of each of a site's held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.profile import section
from ..core.tasks import Example
from ..privacy.release import Scores
from .devicememory import OnSmaller, PhysicalBatch, told_when_full
from .resident import Resident
from .trainer import autocast, by_length, to_device


def evaluate(
    resident: Resident,
    state: AdapterState,
    examples: Sequence[Example],
    config: RunConfig,
    *,
    on_smaller: OnSmaller = lambda setting, size, text: None,
) -> Scores:
    """Scores of the adapter ``state`` on each of ``examples``, in their order. They must not leave the site as such.

    Where memory runs out, fewer examples pass at a time, which ``on_smaller`` is told; raises :class:`UserError` when
    even one is too much.
    """
    resident.adapter.write(state)
    if resident.adapter.model.training:
        resident.adapter.model.eval()
    found = {key: np.zeros(len(examples)) for key in ("examples", "correct", "loss_sum")}
    numbered = [{**example, "at": at} for at, example in enumerate(examples)]

    def score(size: int) -> None:
        for batch in by_length(numbered, range(len(numbered)), size):
            tensors = to_device(resident.task.collate(batch, resident.base.processor), resident.device)
            where = [example["at"] for example in batch]
            for key, values in resident.task.counts(resident.adapter.model, tensors).items():
                found[key][where] = values.double().cpu().numpy()

    batch = PhysicalBatch(resident, config, "evaluate.batch_size", config.evaluate.batch_size, on_smaller)
    with (
        section("evaluation"),
        told_when_full(resident.device, config),
        torch.inference_mode(),
        autocast(config.train, resident.device),
    ):
        batch.run(score, most=len(examples))
    return Scores(**found)
