"""What stands around another aggregation rule: it hands on whatever it does not change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.adapter import AdapterSpec, AdapterState
from ..core.update import Update
from .aggregator import Aggregator
from .local import LocalRule, Training

_INNER = "inner."


class Wrapper(Aggregator):
    """An aggregator around ``inner`` that is ``inner`` in all it does not override, its declarations included.

    A subclass that remembers something overrides :meth:`own_memory` and :meth:`own_recall`; what ``inner`` remembers
    is kept beside it, under a prefix. One whose capabilities differ sets ``self.capabilities``.
    """

    def __init__(self, inner: Aggregator) -> None:
        # Not the base's: that would forget what was set on `inner` already, which the properties below share.
        self.inner = inner
        self.options = inner.options
        # Declared once a class; a wrapper has those of the rule that it happens to be around.
        vars(self).update(
            name=inner.name,
            summary=inner.summary,
            equation=inner.equation,
            source=inner.source,
            capabilities=inner.capabilities,
        )

    @property
    def round(self) -> int:
        return self.inner.round

    @round.setter
    def round(self, number: int) -> None:
        self.inner.round = number

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.inner.ranks

    @ranks.setter
    def ranks(self, ranks: Mapping[str, int]) -> None:
        self.inner.ranks = ranks

    @property
    def score(self) -> Callable[[AdapterState], float] | None:
        return self.inner.score

    @score.setter
    def score(self, score: Callable[[AdapterState], float] | None) -> None:
        self.inner.score = score

    @property
    def principal(self) -> Callable[[AdapterState], Mapping[str, np.ndarray]] | None:
        return self.inner.principal

    @principal.setter
    def principal(self, principal: Callable[[AdapterState], Mapping[str, np.ndarray]] | None) -> None:
        self.inner.principal = principal

    def prepare(self, initial: AdapterState) -> AdapterState:
        return self.inner.prepare(initial)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return self.inner.for_site(state, site)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule | None:
        return self.inner.local(training, memory)

    def warning(self, private: bool) -> str:
        return self.inner.warning(private)

    def start_round(self, state: AdapterState) -> None:
        self.inner.start_round(state)

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        return self.inner.asked(sites)

    def add(self, update: Update) -> None:
        self.inner.add(update)

    def second_pass(self) -> AdapterState | None:
        return self.inner.second_pass()

    def add_refined(self, update: Update) -> None:
        self.inner.add_refined(update)

    def result(self) -> AdapterState:
        return self.inner.result()

    def own_memory(self) -> Mapping[str, AdapterState]:
        """What the wrapper itself must find again after a restart."""
        return {}

    def own_recall(self, memory: Mapping[str, AdapterState]) -> None:
        """The inverse of :meth:`own_memory`."""

    def memory(self) -> Mapping[str, AdapterState]:
        inner = {f"{_INNER}{name}": state for name, state in self.inner.memory().items()}
        return {**self.own_memory(), **inner}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        own = {name: state for name, state in memory.items() if not name.startswith(_INNER)}
        self.own_recall(own)
        self.inner.recall({name.removeprefix(_INNER): memory[name] for name in memory if name not in own})


class WrappedRule(LocalRule):
    """A site's rule around ``inner`` (or around none) that is ``inner`` in all it does not override."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], inner: LocalRule | None) -> None:
        super().__init__(training, memory)
        self.inner = inner if inner is not None else LocalRule(training, memory)
        self.needs_loss = self.inner.needs_loss

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        return self.inner.begin(received, loss)

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        return self.inner.trains(spec, step)

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        return self.inner.direction(name, gradient, value, start, step)

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        return self.inner.finish(trained, received)

    def remember(self) -> Mapping[str, AdapterState]:
        return self.inner.remember()

    def refine(self, received: AdapterState) -> AdapterState:
        return self.inner.refine(received)

    def personal(self) -> LocalRule | None:
        return self.inner.personal()
