"""What befalls a simulated site in a round: it is away, it is late, or its process dies in the middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..core.adapter import AdapterSpec, AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.wire import Fault, Kind
from ..strategies import Aggregator, LocalRule, Training
from ..strategies.aggregator import find_strategy
from ..strategies.wrapping import WrappedRule
from .availability import Availability
from .clock import Clock


@dataclass(frozen=True)
class Fate:
    """What befalls a site, and why."""

    fault: Fault
    why: str


class Fates:
    """The fate of every site and round of a run: of the configuration alone, whoever asks first."""

    def __init__(self, config: RunConfig) -> None:
        self.clock = Clock(config)
        self.none = not config.simulated
        self.config = config
        self._availability = Availability(config)

    def of(self, kind: Kind, site: str, round: int) -> Fate | None:
        """Of an instruction of ``kind``; round 0 is the evaluation before the first."""
        own = self.config.site(site)
        if own is None:
            return None
        if own.joins > max(round, 1):
            return Fate("absent", f"site {site} joins in round {own.joins}")
        if 0 < own.leaves <= round:
            return Fate("absent", f"site {site} left in round {own.leaves}")
        if kind == "hello":
            return None
        if self._availability.away(site, round):
            return Fate("absent", "away in this round")
        if round in own.crashes and kind not in ("keys", "shares"):
            if kind == "train":
                return Fate("crashed", "it died in the middle of the training")
            return Fate("absent", "its process died in this round")
        if kind == "train" and own.straggler:
            return Fate("late", "no answer in time")
        return None

    def late(self, site: str, down: int, up: int = 0) -> Fate | None:
        """Whether a training with messages of so many bytes ends after the deadline."""
        if self._needed(site, down, up) <= self.clock.deadline:
            return None
        return Fate("late", f"no answer in {self.clock.deadline:g} virtual seconds")

    def rounds_late(self, site: str, down: int, up: int) -> int:
        """In how many rounds from now the result of a training that is late arrives.

        A round in which somebody is late takes the deadline; what else a round takes is not counted.
        """
        if not self.clock.runs:
            return 1
        return max(1, math.ceil(self._needed(site, down, up) / self.clock.deadline) - 1)

    def _needed(self, site: str, down: int, up: int) -> float:
        clock = self.clock
        return (clock.down(site, down) + clock.compute(site, "train") + clock.up(site, up)).total


def require_enough(config: RunConfig) -> None:
    """Raise :class:`UserError` when some round is bound to miss its quorum.

    Whom the seed sends away is known beforehand, so a run that must fail fails before anything is spent.
    """
    drawn = config.server.sites_per_round or (config.central.enabled and config.central.sampling_rate < 1)
    if drawn or find_strategy(config.strategy).asked is not Aggregator.asked:
        return  # who is asked at all is not known here
    fates = Fates(config)
    liars = {site.name for site in config.data.sites if site.attack == "nan"}
    if fates.none:
        return
    for number in range(1, config.rounds + 1):
        left = [
            site
            for site in config.site_names
            if site not in liars and not fates.of("train", site, number) and not fates.late(site, 0)
        ]
        if len(left) < config.quorum:
            raise UserError(
                f"round {number}: {len(left)} of {len(config.site_names)} sites would answer with this seed, and the "
                f"quorum is {config.quorum}; lower server.quorum or simulation.dropout, or take another seed"
            )


class Lost(UserError):
    """A training that came to nothing."""


class Doomed(WrappedRule):
    """The part of a site whose training is lost: it dies after half of its steps, or is done too late.

    Without privacy, and where nothing of it would stay at the site either, it is not computed at all. Under privacy
    it is, for as long as a real site would: what its steps spend stands in the ledger.
    """

    def __init__(
        self,
        training: Training,
        memory: Mapping[str, AdapterState],
        inner: LocalRule | None,
        fate: Fate,
        *,
        owes: bool,
    ) -> None:
        super().__init__(training, memory, inner)
        self._fate = fate
        self._keeps = inner is not None or owes

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        keeps = self._fate.fault == "late" and (self._keeps or bool(received.spec.select("local")))
        if not self.training.private and not keeps:
            raise Lost(self._fate.why)
        return super().begin(received, loss)

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        if self._fate.fault == "crashed" and step == self.training.steps // 2:
            raise Lost(self._fate.why)
        return super().trains(spec, step)
