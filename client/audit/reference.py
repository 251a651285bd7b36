"""Every record's gradient by itself: one plain backward pass each, without any engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ...core.adapter import AdapterState
from ...core.config import RunConfig
from ...core.tasks import Example
from ..resident import Resident
from ..trainer import autocast, to_device


class Reference:
    """The gradients of single records at ``state``, computed when first asked for and kept.

    ``sum_records``: a unit's gradient is the sum of its records' gradients instead of their mean.
    """

    def __init__(self, resident: Resident, state: AdapterState, examples: Sequence[Example], config: RunConfig) -> None:
        self._resident = resident
        self._state = state
        self._examples = examples
        self._config = config
        self._known: dict[int, torch.Tensor] = {}

    @property
    def size(self) -> int:
        return sum(self._state[name].size for name in self._names())

    def _names(self) -> list[str]:
        frozen = set(self._state.spec.select("freeze"))
        return [name for name in self._state if name not in frozen]

    @property
    def tensors(self) -> list[tuple[str, int]]:
        """Name and size of each trained tensor, in the order of the numbers below."""
        return [(name, self._state[name].size) for name in self._names()]

    def records(self, indices: Iterable[int]) -> torch.Tensor:
        """The gradient of each record, (R, P), in float32."""
        wanted = list(indices)
        missing = [index for index in dict.fromkeys(wanted) if index not in self._known]
        if missing:
            self._compute(missing)
        if not wanted:
            return torch.zeros(0, self.size)
        return torch.stack([self._known[index] for index in wanted])

    def units(self, records: Sequence[int], owner: np.ndarray) -> torch.Tensor:
        """The gradient of each unit that has a part in ``records``, (U, P). ``owner``: the unit of every record."""
        rows = self.records(records)
        units, where = np.unique(owner[list(records)], return_inverse=True)
        total = torch.zeros(len(units), self.size).index_add_(0, torch.from_numpy(where.reshape(-1)), rows)
        if self._config.privacy.unit == "patient" and self._config.privacy.patient_gradient == "mean":
            total /= torch.from_numpy(np.bincount(where.reshape(-1), minlength=len(units)))[:, None]
        return total

    def _compute(self, indices: Sequence[int]) -> None:
        resident, settings = self._resident, self._config.train
        adapter, task = resident.adapter, resident.task
        adapter.adopt(self._state.spec)
        adapter.write(self._state)
        parameters = list(adapter.trainables().values())
        adapter.model.eval()
        for index in indices:
            batch = to_device(task.collate([self._examples[index]], resident.base.processor), resident.device)
            with autocast(settings, resident.device):
                losses = task.losses(adapter.model, batch)
            parts = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
            self._known[index] = torch.cat(
                [
                    (torch.zeros_like(p) if part is None else part).detach().reshape(-1).to("cpu", torch.float32)
                    for p, part in zip(parameters, parts, strict=True)
                ]
            )
