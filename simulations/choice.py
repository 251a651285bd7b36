"""Which engine a simulation runs on, with how many processes and threads, and why.

It hangs on the configuration and the machine alone, never on how busy the machine is: the number of threads is part of
what fixes the last bits of a result, and the same command must give the same result tomorrow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from ..client.data import SiteData
from ..client.resident import device_of
from ..core.basemodel import quiet, resolve
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.tasks import create_task
from ..methods import create_method
from ..strategies.aggregator import find_strategy
from .engines import torchrun
from .execution import Engine, Execution

#: What a core does: multiplications and additions of a transformer in a second, and seconds of a step besides.
_RATE, _STEP = 30e9, 0.008
#: Operations a parameter and token of a step (forward, and twice that backward) and of an evaluation.
_TRAIN, _EVALUATE = 6, 2
#: Seconds of arithmetic, on one core, from which on several processes win more than their start costs.
_WORTH = 90.0
#: Seconds of a step below which a second thread does harm rather than good.
_SMALL = 0.05
#: Bytes that a worker needs beside its share of the base model.
_WORKER_BYTES = 1e9
#: The part of the memory that workers may have.
_SHARE = 0.6
_IMAGES = ("image-classification",)
#: Records of a site whose lengths are looked at.
_SAMPLE = 100
#: So many sites stand for all, and so many are told apart by what they have to do.
_SITES, _WEIGHED = 16, 64


@dataclass(frozen=True)
class Choice:
    """What a run is computed on; ``threads``: of each process, the server's too; ``why``: a line for people."""

    engine: Engine
    workers: int
    threads: int
    cohort: int
    why: str

    def told(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    @property
    def line(self) -> str:
        processes = f", {self.workers} processes" if self.engine == "workers" else ""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"engine {self.engine}{processes}, {threads}{' each' if processes else ''}: {self.why}"


def choose(
    execution: Execution, config: RunConfig, data: Mapping[str, SiteData], before: Mapping[str, Any] | None = None
) -> Choice:
    """What ``execution`` leaves open, settled.

    ``before``: the choice that a run to be resumed was begun with, whose threads it keeps. Raises :class:`UserError`
    for more threads than Flower's runtime could find cores for.
    """
    if execution.engine == "flower":
        if execution.threads > cores():
            raise UserError(
                f"--threads {execution.threads}: Flower's runtime reserves as many cores for a site, and there are "
                f"{cores()}"
            )
        return on_flower(execution.threads)
    asked = execution.threads or (before or {}).get("threads", 0)
    pinned = asked or _pinned()
    most = min(len(config.site_names), _gpus(config) or max(1, cores() // (pinned or 1)))
    count = torchrun.ranks() or min(execution.workers or most, len(config.site_names))
    engine: Engine = execution.engine
    why = "asked for"
    if engine == "auto":
        engine, count, own, why = _found(config, data, count)
        asked, pinned = asked or own, pinned or own
    if engine == "inprocess":
        return Choice(engine, 1, asked or torch.get_num_threads(), execution.cohort, why)
    return Choice(engine, count, pinned or max(1, cores() // torchrun.here(count)), execution.cohort, why)


def on_flower(threads: int) -> Choice:
    """Flower's runtime, whose processes have as many threads as it gives them cores."""
    return Choice("flower", 0, threads or 1, 1, "asked for")


def _found(config: RunConfig, data: Mapping[str, SiteData], most: int) -> tuple[Engine, int, int, str]:
    """The engine, how many workers of ``most`` it has room for, threads (0: as always), and why."""
    if torchrun.ranks() > 1:
        return "workers", most, 0, f"torchrun has started {torchrun.ranks()} processes"
    if len(config.site_names) == 1:
        return "inprocess", 1, 0, "there is one site"
    if (name := _ours_alone(config)) != "":
        return "inprocess", 1, 0, f"`{name}` is known to this process alone"
    if (gpus := _gpus(config)) > 1:
        return "workers", most, 0, f"there are {gpus} GPUs"
    if device_of(config.train.device).type != "cpu":
        return "inprocess", 1, 0, "there is one GPU"
    model = _model(config)
    if model is None:
        return "inprocess", 1, 0, f"what {config.model} takes to compute is not known"
    room = int(_SHARE * psutil.virtual_memory().total / (_WORKER_BYTES + 4 * model.parameters))
    if min(most, room) < 2:
        return (
            "inprocess",
            1,
            0,
            "there are cores for one process" if room > 1 else "there is memory for one base model",
        )
    seconds, steps = arithmetic(config, data, model)
    told = f"about {seconds / 60:.0f} min" if seconds > 120 else f"about {seconds:.0f} s"
    if seconds < _WORTH:
        # Threads of a small step wait for each other more than they compute.
        own = 1 if seconds < steps * _SMALL else 0
        return "inprocess", 1, own, f"{told} of arithmetic for one core are not worth more processes"
    return "workers", min(most, room), 0, f"{told} of arithmetic for one core, and there are {cores()}"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pinned() -> int:
    """The threads that the environment asks for, 0 for none."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() else 0


def _gpus(config: RunConfig) -> int:
    """GPUs that the run may spread over."""
    return torch.cuda.device_count() if config.train.device in ("auto", "cuda") else 0


def _ours_alone(config: RunConfig) -> str:
    """The strategy, method or task of the run that another process would not find; empty when all are installed."""
    installed = {entry.name for entry in entry_points(group="fedgraft.strategies")}
    used = {
        config.strategy: find_strategy(config.strategy),
        config.method.name: type(create_method(config.method.name)),
        config.task.name: type(create_task(config.task)),
    }
    for name, kind in used.items():
        if kind.__module__.partition(".")[0] != "fedgraft" and name not in installed and not name.startswith("flwr:"):
            return name
    return ""


@dataclass(frozen=True)
class Model:
    """``parameters`` of a transformer's layers, by which a token is multiplied; ``patches`` of an image, else 0."""

    parameters: int
    patches: int = 0


def _model(config: RunConfig) -> Model | None:
    """What the base model's own configuration tells; None for what is no transformer."""
    try:
        with quiet():
            found = AutoConfig.from_pretrained(resolve(config.model), trust_remote_code=False).get_text_config()
        width, layers = int(found.hidden_size), int(found.num_hidden_layers)
    except Exception:
        return None  # the run itself will say what is wrong with it
    inner = getattr(found, "intermediate_size", None) or 4 * width
    side = (
        getattr(found, "image_size", 0) // (getattr(found, "patch_size", 0) or 1) if config.task.name in _IMAGES else 0
    )
    return Model(layers * (4 * width * width + 2 * width * int(inner)), side * side)


def arithmetic(config: RunConfig, data: Mapping[str, SiteData], model: Model) -> tuple[float, float]:
    """Seconds that the run's trainings and evaluations would take one core, roughly, and steps of all sites."""
    every = config.evaluate.every
    evaluations = 1 + sum(r == config.rounds or bool(every and r % every == 0) for r in range(1, config.rounds + 1))
    share = (config.server.sites_per_round or len(config.site_names)) / len(config.site_names)
    operations = steps = 0.0
    some = config.site_names[:: math.ceil(len(config.site_names) / _SITES)]
    for site in (data[name] for name in some):
        tokens = model.patches or _tokens(site.train.inputs, config.task.max_length)
        batch = min(config.train.batch_size, len(site.train)) * tokens
        operations += model.parameters * _TRAIN * share * config.rounds * config.train.local_steps * batch
        operations += model.parameters * _EVALUATE * evaluations * len(site.held_out) * tokens
        steps += share * config.rounds * config.train.local_steps
    scale = len(config.site_names) / len(some)
    return (operations / _RATE + steps * _STEP) * scale, steps * scale


def _tokens(texts: Sequence[Any], most: int) -> float:
    """Of an average record: a token is about four letters, and two mark its ends."""
    some = [min(most, len(str(text)) / 4 + 2) for text in texts[:_SAMPLE]]
    return sum(some) / len(some)


def loads(config: RunConfig, data: Mapping[str, SiteData]) -> list[float]:
    """What each site's round takes to compute, against the others': records that it trains on or evaluates.

    Thousands of sites even out, and their data are not made for this.
    """
    if len(config.site_names) > _WEIGHED:
        return [1.0] * len(config.site_names)
    return [_load(config, data[name]) for name in config.site_names]


def _load(config: RunConfig, site: SiteData) -> float:
    trained = config.train.local_steps * min(config.train.batch_size, len(site.train))
    return trained + len(site.held_out) * _EVALUATE / _TRAIN


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads in this process, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
