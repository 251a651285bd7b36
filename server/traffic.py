"""What a strategy sends: bytes up and down for each site and round, for a given model, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, BertConfig

from ..core.adapter import AdapterSpec, AdapterState, LowRankPair
from ..core.basemodel import BaseModel, quiet, resolve
from ..core.config import MethodConfig, TaskConfig
from ..core.errors import UserError, one_line
from ..core.tasks import Task, create_task
from ..core.tasks.base import head_modules
from ..methods import AttachedAdapter, attach, create_method
from ..strategies import Aggregator
from ..strategies.contract.bench import Bench, fresh
from ..strategies.one_shot import OneShot

BERT_BASE = "bert-base, from its configuration"
_ROUNDS = 3
SITES = 4
_TASKS = ("sequence-classification", "image-classification")


@dataclass(frozen=True)
class Traffic:
    """Payload of one site in the first rounds, in bytes of the tensors in fp32, each tensor sent when it has changed.

    ``parameters``: numbers in the adapter; ``model``: bytes of the whole model, for comparison.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    parameters: int
    model: int


@dataclass(frozen=True)
class Skeleton:
    """A base model without weights, and the task whose head it has: what methods are counted on."""

    name: str
    base: BaseModel
    task: Task

    def attach(self, config: MethodConfig) -> AttachedAdapter:
        """The adapter of ``config`` on a copy. Raises :class:`UserError` where it does not fit."""
        # Singular vectors need weights; drawn bases have the same shapes.
        method = create_method(config.name)
        if not config.init and "init" in method.accepts and method.frozen:
            config = config.model_copy(update={"init": "orthonormal"})
        return attach(replace(self.base, model=copy.deepcopy(self.base.model)), config, self.task, seed=0)


def skeleton(model: str, labels: int = 2) -> Skeleton:
    """``model`` (a folder or hub name; empty: BERT-base) made of its configuration, without memory.

    Raises :class:`UserError` when the configuration cannot be read, or no task has a head for it.
    """
    if not model:
        return skeleton_of(BertConfig(), BERT_BASE, labels)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a foreign file fails in as many ways as there are architectures
        raise UserError(f"model {model}: its configuration cannot be read: {one_line(error)[:300]}") from None
    return skeleton_of(config, model, labels)


def skeleton_of(config: Any, name: str, labels: int = 2) -> Skeleton:
    """A model of the configuration ``config``. Raises :class:`UserError` when no task has a head for it."""
    names = tuple(f"label-{number}" for number in range(labels))
    config.num_labels = labels
    for kind in _TASKS:
        task: Any = create_task(TaskConfig(name=kind, labels=names))
        try:
            with torch.device("meta"), quiet():
                network = task.auto_model.from_config(config, trust_remote_code=False)
            break
        except ValueError:
            continue  # an architecture that has no such head
    else:
        raise UserError(f"model {name}: {type(config).__name__} has no head for {' or '.join(_TASKS)}")
    network.requires_grad_(False)
    count = sum(p.numel() for p in network.parameters())
    return Skeleton(name, BaseModel(network, None, "", head_modules(network, task.heads), count, 4 * count), task)


def adapter_of(model: str, method: str, rank: int, labels: int = 2) -> tuple[AdapterSpec, int]:
    """The adapter that ``method`` makes on ``model`` (a folder or hub name; empty: BERT-base), and the model's bytes.

    No weights are read. Raises :class:`UserError`.
    """
    create_method(method)
    found = skeleton(model, labels)
    return found.attach(MethodConfig(name=method, rank=rank, alpha=2.0 * rank)).spec, found.base.bytes


def traffic(make: Callable[[], Aggregator], spec: AdapterSpec, model: int, sites: int = SITES) -> Traffic:
    """Run a strategy on a toy federation of adapters like ``spec``. Raises :class:`UserError` where it refuses."""
    if not isinstance(make(), OneShot):
        up, down = _counted(make, spec, sites)
    else:
        # Merging rules work on dense dW, pair by pair: of each shape two pairs are run, and tell what one more adds.
        groups: dict[tuple[int, ...], list[LowRankPair]] = {}
        for pair in spec.pairs:
            groups.setdefault((*spec.by_name[pair.a].shape, *spec.by_name[pair.b].shape), []).append(pair)
        firsts = [group[0] for group in groups.values()]
        once = np.array(_counted(make, _thinned(spec, firsts), sites))
        total = once.copy()
        for group in groups.values():
            if len(group) > 1:
                twice = np.array(_counted(make, _thinned(spec, [*firsts, group[1]]), sites))
                total += (len(group) - 1) * (twice - once)
        up, down = total.tolist()
    return Traffic(tuple(up), tuple(down), spec.parameters, model)


def _thinned(spec: AdapterSpec, pairs: Collection[LowRankPair]) -> AdapterSpec:
    """``spec`` with no other pairs than ``pairs``."""
    gone = {name for pair in spec.pairs if pair not in pairs for name in (pair.a, pair.b)}
    kept = tuple(pair for pair in spec.pairs if pair in pairs)
    return replace(spec, tensors=tuple(t for t in spec.tensors if t.name not in gone), pairs=kept)


def _counted(make: Callable[[], Aggregator], spec: AdapterSpec, sites: int) -> tuple[list[int], list[int]]:
    """Bytes up and down of the first site, for each round."""
    bench = Bench(make, fresh(spec), {f"site-{number:02d}": 1.0 for number in range(sites)})
    site = "site-00"
    up, down = [], []
    held: dict[str, bytes] = {}
    for _ in range(_ROUNDS):
        bench.open()
        got = _taken(bench.received(site), held)
        updates = [bench.answer(each) for each in bench.asked]
        sent = sum(_size(update.state) for update in updates if update.site == site)
        bench.close(updates)
        if bench.second is not None and site in bench.refined:
            got += _taken(bench.second, held)
            sent += _size(bench.refined[site].state)
        up.append(sent)
        down.append(got)
    return up, down


def _size(state: AdapterState) -> int:
    return sum(array.nbytes for array in state.values())


def _taken(state: AdapterState, held: dict[str, bytes]) -> int:
    """The bytes of what the site does not hold yet, which it then does."""
    fresh_bytes = {name: array.tobytes() for name, array in state.items()}
    new = sum(len(data) for name, data in fresh_bytes.items() if held.get(name) != data)
    held.clear()
    held.update(fresh_bytes)
    return new
