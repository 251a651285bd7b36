"""What all robust rules but one share: they keep the updates of a round, and hand what they make of them on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ...core.update import Update
from ..aggregator import Capabilities, Options, create_aggregator
from ..wrapping import Wrapper
from .distances import Change, change, norm

#: Longer than any training makes a change, and short enough that no product of two overflows.
_LONGEST = 1e60


class RobustOptions(Options):
    """``then``: the strategy that aggregates what is left; ``then_options``: its options.

    ``weigh``: give the updates that are left the weight of their records. Off by default: the number of records is the
    site's own word, and a site that lies would say that it has many.
    """

    then: str = Field("fedit", description="the strategy that aggregates what is left")
    then_options: dict[str, Any] = Field(default_factory=dict, description="options of that strategy")
    weigh: bool = Field(False, description="weigh what is left by the records that sites say they have")


@dataclass(frozen=True)
class Sent:
    """An update, what its site had received, and the change between the two."""

    update: Update
    received: AdapterState
    change: Change


class Robust(Wrapper):
    """A strategy around the one that ``options.then`` names, which it is in all it does not override."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_individual=True)
    Options: ClassVar[type[Options]] = RobustOptions

    def __init__(self, options: Any = None) -> None:
        options = options if options is not None else self.Options()
        super().__init__(create_aggregator(options.then, options.then_options))
        self.options = options
        # These are the rule's own, and not those of the strategy behind it.
        for mine in ("name", "summary", "equation", "source"):
            vars(self).pop(mine, None)
        can = self.inner.capabilities
        if can.two_passes:
            raise UserError(
                f"strategy `{self.name}` chooses among the answers of one pass, and `{options.then}` asks each site "
                f"twice; name another strategy in strategy_options.then"
            )
        vars(self)["capabilities"] = replace(can, linear_sum=False, needs_individual=True, exact=False)


class Judge(Robust):
    """Keeps the updates of a round, so that memory grows with the sites, and judges them together.

    All updates count alike, unless ``weigh``. Raises :class:`UserError` for fewer sites, or fewer answers in a round,
    than the rule needs.
    """

    #: Whether numbers of two sites at one place of a factor are compared: then all must have had the same factors.
    common_start: ClassVar[bool] = False

    @property
    def needed(self) -> int:
        """The least number of updates that the rule can judge."""
        return 1

    @property
    def condition(self) -> str:
        """Where that number comes from, for people."""
        return f"at least {self.needed}"

    @abstractmethod
    def judged(self, sent: list[Sent]) -> Iterable[Update]:
        """What ``then`` shall aggregate of ``sent``, which is in the order of the sites' names."""

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.inner.ranks

    @ranks.setter
    def ranks(self, ranks: Mapping[str, int]) -> None:
        # Told of every site of the run before it begins: a rule that can never be kept is refused here.
        if ranks and len(ranks) < self.needed:
            raise UserError(f"strategy `{self.name}` needs {self.condition} sites; the run has {len(ranks)}")
        self.inner.ranks = ranks

    def start_round(self, state: AdapterState) -> None:
        self.inner.start_round(state)
        self._state = state
        self._sent: list[Sent] = []

    def add(self, update: Update) -> None:
        site, state = update.site, update.state.require_finite()
        received = self.inner.for_site(self._state, site)
        require_like(update, received)
        with np.errstate(over="ignore", invalid="ignore"):
            made = change(received, state)
            length = norm(made)
        if not length < _LONGEST:
            raise UserError(f"{site}: the numbers of its update are too large to be compared")
        if self.common_start and self._sent and not _same(received, self._sent[0].received):
            raise UserError(
                f"{site}: trains from other factors than {self._sent[0].update.site}, and strategy `{self.name}` "
                f"compares factors number by number; name another strategy than `{self.options.then}` in "
                "strategy_options.then, or give all sites one rank"
            )
        self._sent.append(Sent(update, received, made))

    def result(self) -> AdapterState:
        if len(self._sent) < self.needed:
            raise UserError(
                f"strategy `{self.name}` needs {self.condition} updates, and {len(self._sent)} arrived; wait for the "
                "others, and raise server.quorum so that no round is closed without them"
            )
        sent, self._sent = sorted(self._sent, key=lambda one: one.update.site), []
        for update in self.judged(sent):
            self.inner.add(update)
        return self.inner.result()

    def weight(self, update: Update) -> float:
        """The weight of an update before it is judged."""
        return update.weight if self.options.weigh else 1.0


def require_like(update: Update, received: AdapterState) -> None:
    """Raise :class:`UserError` unless ``update`` holds what was shared of ``received``, and has a weight."""
    site, state = update.site, update.state
    if not 0 < update.weight < np.inf:
        raise UserError(f"{site}: the weight of its update is {update.weight}; it must be a positive number")
    if tuple(state) != state.spec.select("share"):
        odd = min(set(state) ^ set(state.spec.select("share")), default="the order")
        raise UserError(f"{site}: its update does not hold the shared tensors ({odd})")
    for name in state:
        if name not in received or received[name].shape != state[name].shape:
            raise UserError(f"{site}: tensor {name} of its update has another shape than the one that it was sent")
    if state.spec.pairs != received.spec.pairs:
        raise UserError(f"{site}: scales or lays out its low-rank factors otherwise; set method.alpha alike")


def _same(one: AdapterState, other: AdapterState) -> bool:
    return tuple(one) == tuple(other) and all(np.array_equal(one[name], other[name]) for name in one)
