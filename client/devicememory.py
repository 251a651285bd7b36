"""How many examples go through a model at once: fewer where the device has no room for more, the batch being the same.

The logical batch is never touched: a step adds up over as many passes as it takes. What a training needs is estimated
before its first step (:func:`require_room`); where the estimate was too low, :class:`PhysicalBatch` goes on with less.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.config import RunConfig
from ..core.errors import UserError, is_out_of_memory
from ..core.progress import Watch
from ..core.tasks import Example
from .resident import Resident

T = TypeVar("T")
#: Told when fewer examples pass at a time than a setting asks for: (setting, how many, a line for people).
OnSmaller = Callable[[str, int, str], None]

#: Part of the free memory that is left to others.
_LEFT = 0.1
# Beside what tensors take: glibc keeps what was freed (1.56 to 1.68 times as much was measured), CUDA's allocator
# rounds, and its libraries have work space.
_SLACK = {"cpu": 1.8, "cuda": 1.2, "mps": 1.3}
_GIB = 2**30


def telling(watch: Watch, site: str) -> OnSmaller:
    """What tells whoever watches, at the site, that fewer examples pass at a time."""
    return lambda setting, size, text: watch.smaller_batch(site, setting, size, text)


@dataclass
class _Fitting:
    """What is known of a model: how many examples fit, by (setting, private), and which plans were looked at."""

    sizes: dict[tuple[str, bool], int]
    plans: set[tuple[Any, ...]]


_fitting: WeakKeyDictionary[nn.Module, _Fitting] = WeakKeyDictionary()
_processes = 1


def share_device(processes: int) -> None:
    """Say how many processes train on this one's device, so that each plans with its part of the memory."""
    global _processes
    _processes = max(1, processes)


def _known(resident: Resident) -> _Fitting:
    return _fitting.setdefault(resident.adapter.model, _Fitting({}, set()))


# --- when memory has run out -----------------------------------------------------------------------------------------


class PhysicalBatch:
    """How many examples of a step pass through a resident model at once.

    ``setting`` names the key of the configuration that asks for ``asked``; ``private``: with a gradient for each.
    """

    def __init__(
        self,
        resident: Resident,
        config: RunConfig,
        setting: str,
        asked: int,
        on_smaller: OnSmaller,
        *,
        private: bool = False,
    ) -> None:
        self._device, self._config, self._setting = resident.device, config, setting
        self._asked, self._on_smaller = asked, on_smaller
        self._sizes = _known(resident).sizes
        self._key = (setting, private)

    @property
    def size(self) -> int:
        """As many as asked for, or what was found to fit: the next site and the next round begin with that."""
        return min(self._asked, self._sizes.get(self._key, self._asked))

    def run(self, attempt: Callable[[int], T], undo: Callable[[], None] = lambda: None, *, most: int) -> T:
        """``attempt(size)``, again with half of it whenever memory runs out, after ``undo`` has dropped what was begun.

        ``most``: as many examples as an attempt has at all. Each attempt draws the same dropout. Raises
        :class:`UserError` when a single example is too much.
        """
        drawn = self._generators()
        while True:
            size = min(self.size, most)
            try:
                return attempt(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Only here, where the error and with it every tensor of the attempt is gone, is there room again.
            undo()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if size <= 1:
                raise UserError(_too_large(self._device, self._config))
            self.reduce(size // 2, f"out of memory on {self._device}")
            self._draw_again(drawn)

    def reduce(self, size: int, why: str) -> None:
        """Let no more than ``size`` examples pass at a time from now on, and tell."""
        self._sizes[self._key] = size
        text = f"{why}: {self._setting} is {size} from now on instead of {self._asked}; the batch stays what it is"
        self._on_smaller(self._setting, size, text)

    def _generators(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _draw_again(self, drawn: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], self._device)


@contextmanager
def told_when_full(device: torch.device, config: RunConfig) -> Iterator[None]:
    """Raise :class:`UserError` in place of what is raised when memory runs out where no smaller part would help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    raise UserError(_too_large(device, config))


def _too_large(device: torch.device, config: RunConfig) -> str:
    return f"out of memory on {device} with a single example; {_mend(config)}"


def _mend(config: RunConfig) -> str:
    checkpointing = "" if config.train.gradient_checkpointing else "set train.gradient_checkpointing = true, "
    return (
        f"{checkpointing}choose a shorter task.max_length (now {config.task.max_length}), a smaller model or another "
        "train.device"
    )


# --- before the first step -------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within: ``most`` were alive at once, ``now`` still are.

    Every storage counts once, from the operation that makes it to its end; what was there before does not. What an
    operation takes and gives back by itself is out of sight. As PyTorch's own `MemTracker` counts, for any device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {storage._cdata: storage for storage in _storages(result) if storage._cdata not in self._alive}
        if made:
            given = {storage._cdata for storage in _storages((args, kwargs))}
            for key in made.keys() - given:
                self._add(key, made[key])
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True)
class Needed:
    """Bytes that a training takes beside the loaded model: ``fixed``, and ``each`` for every example at a time."""

    fixed: int
    each: int

    def of(self, examples: int) -> int:
        return self.fixed + self.each * examples

    def largest(self, room: float) -> int:
        """How many examples at a time ``room`` bytes allow."""
        return max(0, int((room - self.fixed) // max(1, self.each)))


def estimated(rehearse: Callable[[int], None], fixed: int, device: torch.device) -> Needed:
    """What a training needs by what ``rehearse(1)`` and ``rehearse(2)`` take; ``fixed``: bytes whatever the batch."""
    most = []
    for examples in (1, 2):
        with Peak() as peak:
            rehearse(examples)
        most.append(peak.most)
    each = most[1] - most[0]
    slack = _SLACK.get(device.type, 1.3)
    return Needed(int(slack * (fixed + max(0, most[0] - each))), int(slack * each))


def room(device: torch.device) -> float:
    """Bytes that this process may plan with on ``device``: its part of what is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = min(psutil.virtual_memory().available, _group_allows())
    return free * (1 - _LEFT) / _processes


def _group_allows(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container of Linux still allows, infinity where nothing limits it: file pages make way for others."""
    try:
        limit = float((folder / "memory.max").read_text())
        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - float(used["anon"])
    except (OSError, ValueError, KeyError):
        return float("inf")


def require_room(
    resident: Resident,
    examples: Sequence[Example],
    config: RunConfig,
    rehearse: Callable[[list[Example]], None],
    on_smaller: OnSmaller,
    *,
    private: bool,
) -> None:
    """Let no more examples pass at a time than fit, once a process, model and plan. The longest possible text counts.

    ``rehearse`` goes forward and backward as a step does with the examples that it is given. Raises
    :class:`UserError` when not even one privacy unit fits. What is far from filling the memory costs nothing.
    """
    train, privacy = config.train, config.privacy
    known = _known(resident)
    plan = (private, privacy.engine, privacy.records_per_patient, train, config.task.max_length, _processes)
    if plan in known.plans or not examples:
        return
    known.plans.add(plan)
    batch = PhysicalBatch(resident, config, "train.micro_batch", train.micro_batch, on_smaller, private=private)
    trained = sum(p.numel() for p in resident.adapter.trainables().values())
    # Gradients and sums, the optimizer's state, and under privacy the noise and what is made of both.
    fixed = 4 * trained * (2 + 2 * (train.optimizer == "adamw") + 3 * private)
    free = room(resident.device)
    if _SLACK.get(resident.device.type, 1.3) * (fixed + _at_most(resident, config, trained)) < free:
        return
    example = longest(examples, config.task.max_length)
    try:
        needed = estimated(lambda count: rehearse([example] * count), fixed, resident.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = Needed(0, int(2 * free) + 1)
    least = privacy.records_per_patient if private else 1
    fits = needed.largest(free)
    shared = f", a part of {_processes} of what is free" if _processes > 1 else ""
    if fits < least:
        records = "a single example" if least == 1 else f"the {least} examples of privacy.records_per_patient"
        raise UserError(
            f"training needs {needed.of(least) / _GIB:.2g} GiB on {resident.device} for {records} at a time, there "
            f"are {free / _GIB:.2g}{shared}; {_mend(config)}"
        )
    if fits < batch.size:
        batch.reduce(
            fits,
            f"{batch.size} examples at a time need {needed.of(batch.size) / _GIB:.2g} GiB on {resident.device}, there "
            f"are {free / _GIB:.2g}{shared}",
        )


def longest(examples: Sequence[Example], length: int) -> Example:
    """The longest of ``examples``; a text goes on until it has ``length`` tokens."""
    example = max(examples, key=lambda example: example["length"])
    ids = example.get("ids")
    if not ids or len(ids) >= length:
        return example
    return {**example, "ids": [ids[at % len(ids)] for at in range(length)], "length": length}


def _at_most(resident: Resident, config: RunConfig, trained: int) -> float:
    """Bytes that the examples of a physical batch cannot well exceed, without a pass; infinity where that is unknown.

    Each layer's input and output at every position, four times over, the attention's weights, and rows of gradients.
    """
    model, settings = resident.base.model, getattr(resident.base.model, "config", None)
    layers, heads = (getattr(settings, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if resident.task.input_kind != "text" or not isinstance(layers, int) or not isinstance(heads, int):
        return float("inf")
    positions = config.task.max_length + config.method.virtual_tokens
    width = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 1:
            width += weight.shape[-1] + (0 if isinstance(module, nn.Embedding) else weight.shape[0])
    numbers = positions * width + layers * heads * positions**2
    return 4.0 * config.train.micro_batch * (4 * numbers + 2 * trained)
