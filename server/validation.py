"""What an adapter is worth on records of the server's own: for strategies that weigh or trust updates by it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.adapter import AdapterState
from ..core.basemodel import BaseModel
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.records import read_table
from ..core.tasks import Task
from ..methods import AttachedAdapter


def make_score(
    config: RunConfig, base: BaseModel, adapter: AttachedAdapter, task: Task
) -> Callable[[AdapterState], float]:
    """The accuracy, from 0 to 1, that an adapter reaches on the records of ``server.validation``.

    ``adapter`` is on ``base``, whose weights must stay in memory for as long as scores are asked for; it is on the
    device that ``train.device`` names from the first score on. A score asks for a whole adapter, needs no order of
    calls, and is the same on every call. Whoever answers for the server answers for these records: a score tells of
    them, through the weights that a strategy makes of it.

    Raises :class:`UserError` that names the file, when it cannot be read, lacks a column, or holds unknown labels.
    """
    path = config.server.validation
    if not path:
        raise UserError("server.validation names no file; a strategy that scores adapters needs one")
    table = read_table(path, config, trains=False)
    labels = None if table.labels is None else table.labels.tolist()
    examples = sorted(task.encode(table.inputs, labels, base.processor), key=lambda example: example["length"])
    size = config.evaluate.batch_size

    def score(state: AdapterState) -> float:
        model = adapter.model.to(_device(config.train.device))
        adapter.write(state)
        model.eval()
        correct = counted = 0.0
        with torch.inference_mode():
            for start in range(0, len(examples), size):
                batch = task.collate(examples[start : start + size], base.processor)
                batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
                found = task.counts(model, batch)
                correct += float(found["correct"].double().sum())
                counted += float(found["examples"].double().sum())
        if not counted:
            raise UserError(f"{path}: holds nothing to score an adapter on")
        return correct / counted

    return score


def _device(name: str) -> torch.device:
    """The device that ``train.device`` names, where the server has it; else the processor."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return torch.device("cpu")
    return device
