"""The base model that stays in memory between rounds, with its adapter attached: loaded once a process."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from ..core.basemodel import BaseModel
from ..core.config import RunConfig
from ..core.errors import UserError, is_out_of_memory
from ..core.profile import section
from ..core.tasks import Task, create_task
from ..methods import AttachedAdapter, attach

#: One for the run's base model, and one more so that a site with another model cannot evict it each round.
_KEEP = 2
_residents: OrderedDict[tuple[str, ...], Resident] = OrderedDict()


@dataclass(frozen=True)
class Resident:
    """A loaded base model, its task, and the adapter on it."""

    base: BaseModel
    task: Task
    adapter: AttachedAdapter
    device: torch.device


def device_of(name: str) -> torch.device:
    """The device that ``train.device`` names; ``auto`` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"train.device `{name}` is not there; use cpu, or auto to take what there is") from None
    return device


def wait() -> None:
    """Wait for what the devices of the resident models were given to do."""
    for device in {model.device for model in _residents.values()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def resident(config: RunConfig) -> Resident:
    """The model of a run, from memory when it is there."""
    parts = (config.model, config.method.to_json(), config.task.to_json(), str(config.seed), config.train.device)
    found = _residents.pop(parts, None)
    if found is None:
        task = create_task(config.task)
        device = device_of(config.train.device)
        with section("load"):
            base = task.load(config.model, config.task, config.seed)
            adapter = attach(base, config.method, task, config.seed)
            _move(adapter.model, device, base)
        found = Resident(base, task, adapter, device)
    _residents[parts] = found
    while len(_residents) > _KEEP:
        _residents.popitem(last=False)
    return found


def _move(model: nn.Module, device: torch.device, base: BaseModel) -> None:
    try:
        model.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the base model takes {base.bytes / 2**30:.2g} GiB, for which {device} has no room; choose a smaller one "
            "or another train.device"
        ) from None


def forget_all() -> None:
    """Free every resident model."""
    _residents.clear()
