"""A virtual clock: how long a simulated site takes, by the bytes of its messages and the steps that it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.config import RunConfig, SiteConfig
from ..core.wire import Kind
from .chance import normal


@dataclass(frozen=True)
class Times:
    """Virtual seconds of a site from the instruction to the end of its answer."""

    down: float = 0.0
    compute: float = 0.0
    up: float = 0.0

    @property
    def total(self) -> float:
        return self.down + self.compute + self.up

    def __add__(self, other: Times) -> Times:
        return Times(self.down + other.down, self.compute + other.compute, self.up + other.up)


@dataclass(frozen=True)
class Pace:
    """How fast one site is: seconds for its training, for an evaluation, a byte down and a byte up."""

    training: float
    evaluation: float
    down: float
    up: float


class Clock:
    """Virtual seconds by ``[simulation]`` and the keys of the sites.

    A message of b bytes takes latency + 8 b / (10^6 link) s over a link of so many Mbit/s; a training takes steps x
    seconds_per_step / speed. Speeds and links that no key gives are drawn for each site, log-normal.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._paces: dict[str, Pace] = {}
        simulation = config.simulation
        #: Whether anything takes virtual time.
        self.runs = any(
            (
                simulation.seconds_per_step,
                simulation.seconds_per_evaluation,
                simulation.latency,
                *(simulation.uplink, simulation.downlink),
                *(link for site in config.data.sites for link in (site.uplink, site.downlink)),
            )
        )
        self.deadline = config.simulation.deadline or config.server.round_timeout

    def pace(self, site: str) -> Pace:
        if site not in self._paces:
            self._paces[site] = self._drawn(self._config.site(site) or SiteConfig(name=site))
        return self._paces[site]

    def down(self, site: str, size: int) -> Times:
        """An instruction of ``size`` bytes."""
        return Times(down=self._config.simulation.latency + size * self.pace(site).down)

    def compute(self, site: str, kind: Kind) -> Times:
        pace = self.pace(site)
        return Times(compute={"train": pace.training, "evaluate": pace.evaluation}.get(kind, 0.0))

    def up(self, site: str, size: int) -> Times:
        """An answer of ``size`` bytes."""
        return Times(up=self._config.simulation.latency + size * self.pace(site).up)

    def _drawn(self, site: SiteConfig) -> Pace:
        simulation, seed = self._config.simulation, self._config.seed

        def spread(sigma: float, what: str) -> float:
            return math.exp(sigma * normal(seed, what, site.name)) if sigma else 1.0

        def link(given: float, usual: float, what: str) -> float:
            speed = given or usual * spread(simulation.link_spread, what)
            return 8 / (1e6 * speed) if speed else 0.0

        speed = site.speed or spread(simulation.speed_spread, "speed")
        steps = site.local_steps or self._config.train.local_steps
        return Pace(
            training=steps * simulation.seconds_per_step / speed,
            evaluation=simulation.seconds_per_evaluation / speed,
            down=link(site.downlink, simulation.downlink, "downlink"),
            up=link(site.uplink, simulation.uplink, "uplink"),
        )
