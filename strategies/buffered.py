"""FedBuff: the server goes on as soon as some sites are done; late work counts less."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean
from .changes import change, moved
from .lateness import staleness_weight

_VERSION, _CLOCK = "version-", "clock"
_CLOCK_METHOD = "fedbuff"


class FedBuffOptions(Options):
    """``buffer``: how many sites' work makes a round; ``max_staleness``: most rounds that a site's work may be late.

    ``speeds``: by site, 1 where none is given; ``seed``: of the durations.
    """

    buffer: int = Field(2, ge=1)
    max_staleness: int = Field(4, ge=0)
    speeds: dict[str, float] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)

    @field_validator("speeds")
    @classmethod
    def _positive(cls, speeds: dict[str, float]) -> dict[str, float]:
        for site, speed in speeds.items():
            if not 0 < speed < float("inf"):
                raise ValueError(f"the speed of {site} is {speed:g}; give a positive number")
        return speeds


@strategy("fedbuff")
class FedBuff(Aggregator):
    """x <- x + sum_{k in buffer} p_k s(t_k) (y_k - x_{now - t_k}), with s(t) = 1 / sqrt(1 + t), p_k = w_k / sum w.

    y_k was trained from the version that site k had been given t_k rounds ago: its change is taken against that version
    and counts less the older it is. With t_k = 0 for all it is FedIT. The published mean is over the buffer with equal
    weights, which is this for equal records. A server learning rate is server.lr.

    A round is one flush of the buffer. Which sites' work it holds is played, not waited for: every site works all the
    time, for as long as a half-normal draw (the paper's model of durations) over its ``speed``, drawn from ``seed``,
    the site's name and its version; the ``buffer`` sites that are done first are asked in the round, and train then,
    from the version that they began with. Then they begin anew with the newest. So a run is the same on every engine
    and after every restart; it shows what staleness does to accuracy, not what waiting costs in seconds.
    Work as old as ``max_staleness`` goes into the next buffer before all others, even if that makes it larger, so that
    no site is left out and at most max_staleness + 1 versions are kept. A site that does not answer has lost its work.
    For evaluation a site gets the newest version. Source: Nguyen et al. 2022, "Federated Learning with Buffered
    Asynchronous Aggregation", arXiv 2106.06639, Algorithm 1.
    """

    summary = "a round is a buffer of finished sites; a change t rounds late counts 1 / sqrt(1 + t)"
    equation = "x <- x + sum p_k (y_k - x_old) / sqrt(1 + t_k),  t_k = rounds since site k was given x_old"
    source = "Nguyen et al. 2022, arXiv 2106.06639"
    capabilities = Capabilities(needs_individual=True)
    Options = FedBuffOptions
    # A round of late work gives back no single update; the rest of the contract is that of a round without any.
    contract_options: ClassVar[Mapping[str, int]] = {"max_staleness": 0}

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._version = 0
        self._versions: dict[int, AdapterState] = {}
        # Of each site at work: the version that it began with, and when it will be done.
        self._began: dict[str, int] = {}
        self._done: dict[str, float] = {}
        self._now = 0.0
        self._asked: tuple[str, ...] = ()
        self._open = False

    def start_round(self, state: AdapterState) -> None:
        self._state, self._mean = state, RunningMean()
        self._versions[self._version] = state
        self._asked, self._open = (), True

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        """The sites whose work is done first, and those whose work has grown too old."""
        if not self._asked:
            self._begin(sites)
            order = sorted(
                sites, key=lambda site: (self._staleness(site) < self.options.max_staleness, self._done[site])
            )
            due = sum(self._staleness(site) >= self.options.max_staleness for site in sites)
            self._asked = tuple(order[: max(self.options.buffer, due)])
        return [site for site in sites if site in self._asked]

    def _begin(self, sites: Sequence[str]) -> None:
        """Set sites to work that are not."""
        if unknown := sorted(set(self.options.speeds) - set(sites)):
            raise UserError(f"strategy_options.speeds: there is no site {unknown[0]}; there are {', '.join(sites)}")
        for site in sites:
            if site not in self._done:
                self._began[site] = self._version
                self._done[site] = self._now + self._duration(site)

    def _duration(self, site: str) -> float:
        text = f"{self.options.seed}|{site}|{self._version}"
        random = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
        return abs(float(random.standard_normal())) / self.options.speeds.get(site, 1.0)

    def _staleness(self, site: str) -> int:
        return self._version - self._began.get(site, self._version)

    def _base(self, site: str) -> AdapterState:
        """What ``site`` began its work with."""
        return self._versions[self._version - self._staleness(site)]

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        # Between rounds a site is only evaluated.
        return self._base(site) if self._open else state

    def add(self, update: Update) -> None:
        late = self._staleness(update.site)
        self._mean.add(change(update.state, self._base(update.site), staleness_weight(late, 0.5)), update.weight)

    def result(self) -> AdapterState:
        given = moved(self._state, self._mean.result())
        self._now = max((self._done[site] for site in self._asked), default=self._now)
        for site in self._asked:
            del self._began[site], self._done[site]
        self._version += 1
        kept = set(self._began.values())
        self._versions = {number: state for number, state in self._versions.items() if number in kept}
        self._open = False
        return given

    def memory(self) -> Mapping[str, AdapterState]:
        if not self._version:
            return {}
        values = {".now": [float(self._version), self._now]}
        values |= {site: [float(began), self._done[site]] for site, began in sorted(self._began.items())}
        spec = AdapterSpec(_CLOCK_METHOD, tuple(TensorSpec(name, (2,), "float64", policy="local") for name in values))
        clock = AdapterState(spec, {name: np.array(value) for name, value in values.items()})
        return {_CLOCK: clock, **{f"{_VERSION}{number}": state for number, state in self._versions.items()}}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        clock = memory.get(_CLOCK)
        if clock is None:
            return
        if clock.spec.method != _CLOCK_METHOD:
            raise UserError("the checkpoint's memory of fedbuff is not one that this version wrote")
        self._version, self._now = int(clock[".now"][0]), float(clock[".now"][1])
        self._began = {site: int(value[0]) for site, value in clock.items() if site != ".now"}
        self._done = {site: float(value[1]) for site, value in clock.items() if site != ".now"}
        self._versions = {
            int(name.removeprefix(_VERSION)): state for name, state in memory.items() if name.startswith(_VERSION)
        }
