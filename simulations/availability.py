"""Which sites are away in which rounds."""

from __future__ import annotations

import math

from ..core.config import RunConfig
from .chance import uniform


class Availability:
    """Whether a site is away in a round, by ``simulation.availability``: in a share d = ``dropout`` of all rounds.

    `bernoulli`: each round by itself. `markov`: an outage ends in a round with the chance 1 / L and begins with
    d / ((1 - d) L), so that it takes L = ``period`` rounds on average; the first round is drawn with chance d. `daily`:
    the chance is d (1 + cos 2 pi (t / T + phase)) in round t for a day of T = ``period`` rounds, with a phase of the
    site's own.
    """

    def __init__(self, config: RunConfig) -> None:
        self._seed = config.seed
        self._simulation = config.simulation
        # The outages of a site, from the first round on, as far as they were asked for.
        self._outages: dict[str, list[bool]] = {}

    def away(self, site: str, round: int) -> bool:
        """Rounds count from 1; before the first nobody is away."""
        share, period = self._simulation.dropout, self._simulation.period
        if not share or round < 1:
            return False
        if self._simulation.availability == "markov":
            return self._outage(site, round)
        if self._simulation.availability == "daily":
            phase = uniform(self._seed, "noon", site)
            share *= 1 + math.cos(2 * math.pi * (round / period + phase))
        return self._draw(site, round) < share

    def _outage(self, site: str, round: int) -> bool:
        share, period = self._simulation.dropout, self._simulation.period
        known = self._outages.setdefault(site, [self._draw(site, 1) < share])
        ends, begins = 1 / period, share / ((1 - share) * period)
        while len(known) < round:
            drawn = self._draw(site, len(known) + 1)
            known.append(drawn >= ends if known[-1] else drawn < begins)
        return known[round - 1]

    def _draw(self, site: str, round: int) -> float:
        return uniform(self._seed, "away", site, round)
