"""Where the time of a run goes: named sections, measured only while somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, get_args

#: What is told apart, in the order of a table. What is in none of them is the rest of a round.
Section = Literal[
    "load",
    "data",
    "forward",
    "backward",
    "clip",
    "noise",
    "optimizer",
    "evaluation",
    "wire",
    "gate",
    "aggregate",
    "disk",
    "report",
]
SECTIONS: tuple[str, ...] = get_args(Section)


class Profile:
    """Seconds and calls by section; a section within another is taken off it, so that the seconds add up.

    ``wait`` is called at both ends of a section: it waits for what a GPU was given to do.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner: list[float] = []
        self._wait = wait

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """The time that passes within, as that of the section ``name``."""
        self._wait()
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._wait()
            elapsed = time.perf_counter() - began
            self.add(name, elapsed - self._inner.pop())
            if self._inner:
                self._inner[-1] += elapsed

    def add(self, name: str, seconds: float, calls: int = 1) -> None:
        """Take in what was measured elsewhere, in another process for one."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.calls[name] = self.calls.get(name, 0) + calls

    def taken(self) -> dict[str, dict[str, float]]:
        """What was measured since the last call, by section, and begins anew."""
        told = {name: {"seconds": self.seconds[name], "calls": self.calls[name]} for name in self.seconds}
        self.seconds, self.calls = {}, {}
        return told


_current: ContextVar[Profile | None] = ContextVar("profile", default=None)
_NOTHING = nullcontext()


@contextmanager
def profiling(profile: Profile) -> Iterator[Profile]:
    """Measure every section that runs within, in this process."""
    token = _current.set(profile)
    try:
        yield profile
    finally:
        _current.reset(token)


def current() -> Profile | None:
    """The profile that is on."""
    return _current.get()


def section(name: Section) -> AbstractContextManager[None]:
    """A part of the work, measured while a profile is on; costs next to nothing while none is."""
    profile = _current.get()
    return _NOTHING if profile is None else profile.measure(name)
