"""How many examples go through a model at once: fewer where the device has no room for more, the batch being the same.

The logical batch is never touched: a step adds up over as many passes as it takes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..core.config import RunConfig
from ..core.errors import UserError, is_out_of_memory
from .resident import Resident

T = TypeVar("T")
#: Told what a person at the site should know.
Note = Callable[[str], None]

# What was found to fit into memory, by model and kind of pass: the next site and the next round begin with it.
_fitting: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], int]] = WeakKeyDictionary()


class PhysicalBatch:
    """How many examples of a step pass through a resident model at once.

    ``setting`` names the key of the configuration that asks for ``asked``; ``private``: with a gradient for each.
    """

    def __init__(
        self, resident: Resident, config: RunConfig, setting: str, asked: int, note: Note, *, private: bool = False
    ) -> None:
        self._device, self._config, self._setting = resident.device, config, setting
        self._asked, self._note = asked, note
        self._known = _fitting.setdefault(resident.adapter.model, {})
        self._key = (setting, private)

    @property
    def size(self) -> int:
        """As many as asked for, or what was found to fit."""
        return min(self._asked, self._known.get(self._key, self._asked))

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
                raise UserError(too_large(self._device, self._config)) from None
            self._known[self._key] = size // 2
            self._note(
                f"out of memory on {self._device}: {size // 2} examples at a time from now on instead of {size} "
                f"({self._setting}); the batch stays what it is"
            )
            self._draw_again(drawn)

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
    raise UserError(too_large(device, config))


def too_large(device: torch.device, config: RunConfig) -> str:
    """What to say when not one example fits."""
    checkpointing = "" if config.train.gradient_checkpointing else "set train.gradient_checkpointing = true, "
    return (
        f"out of memory on {device} with a single example: {checkpointing}choose a shorter task.max_length (now "
        f"{config.task.max_length}), a smaller model, or another train.device"
    )
