"""What all sides of one secure sum must agree on, and what every key and signature of it is bound to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ...core.config import RunConfig
from ...core.errors import UserError
from .parts import pack
from .ring import Ring

FEWEST_SITES = 3
#: Shares grow with the square of the sites.
MOST_SITES = 1000
_PROTOCOL = b"fedgraft secure sum 1"


def usual_threshold(sites: int) -> int:
    """More than two thirds: up to a third of the sites may collude with a lying server in vain."""
    return max(FEWEST_SITES, 2 * sites // 3 + 1)


def least_threshold(sites: int) -> int:
    """More than half, and three: with fewer, a lying server could have two sets of survivors unmasked, and of two sites
    each would learn the other's numbers."""
    return max(FEWEST_SITES, sites // 2 + 1)


@dataclass(frozen=True)
class Terms:
    """One secure sum: the round ``round`` of ``run`` over ``sites`` (names, sorted), and its :class:`~.ring.Ring`.

    ``threshold``: as many sites must be left at the end, and as many give back what a lost one had masked.
    Raises :class:`UserError` for fewer than three sites and for a threshold that does not protect them.
    """

    run: str
    round: int
    sites: tuple[str, ...]
    threshold: int
    bits: Literal[32, 64]
    limit: float
    most_weight: int

    def __post_init__(self) -> None:
        count = len(self.sites)
        if count < FEWEST_SITES:
            raise UserError(f"a secure sum needs {FEWEST_SITES} sites or more, here are {count}: two reveal each other")
        if count > MOST_SITES:
            raise UserError(f"a secure sum is for {MOST_SITES} sites at most, here are {count}")
        if tuple(sorted(set(self.sites))) != self.sites:
            raise ValueError("the names of the sites are sorted and distinct")
        least = least_threshold(count)
        if not least <= self.threshold <= count:
            raise UserError(
                f"secure_sum.threshold is {self.threshold}; for {count} sites it lies within {least} and {count}"
            )
        self.ring  # noqa: B018  which refuses what it has no room for

    @classmethod
    def of(cls, config: RunConfig, run: str, round: int) -> Terms:
        """Those of a round of ``config``: the server and every site come to the same by themselves."""
        asked, sites = config.secure_sum, tuple(sorted(config.site_names))
        threshold = asked.threshold or usual_threshold(len(sites))
        return cls(run, round, sites, threshold, asked.bits, asked.range, asked.most_records)

    @cached_property
    def ring(self) -> Ring:
        return Ring(self.bits, self.limit, self.most_weight, len(self.sites))

    @property
    def colluders(self) -> int:
        """So many sites may collude with a lying server: two sets of survivors cannot both have signatures enough,
        and in either are two honest sites or more."""
        return min(2 * self.threshold - len(self.sites) - 1, self.threshold - 2)

    def index(self, site: str) -> int:
        """Where ``site`` evaluates the others' polynomials."""
        return self.sites.index(site) + 1

    @property
    def indices(self) -> range:
        return range(1, len(self.sites) + 1)

    @cached_property
    def context(self) -> bytes:
        """All of it in bytes."""
        numbers = (self.round, self.threshold, self.bits, self.most_weight)
        return pack(
            _PROTOCOL,
            self.run.encode(),
            *(str(number).encode() for number in numbers),
            float(self.limit).hex().encode(),
            pack(*(site.encode() for site in self.sites)),
        )
