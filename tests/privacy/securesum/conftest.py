"""A secure sum in one process, with a server that may be made to lie and sites that may be lost at any step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft.privacy.securesum import Roster, SecureServer, SecureSite, Sum, Terms
from fedgraft.privacy.securesum.messages import (
    Advert,
    Adverts,
    Agreement,
    Agreements,
    Envelopes,
    Reveal,
    Survivors,
)
from fedgraft.privacy.securesum.site import Progress
from fedgraft.privacy.securesum.terms import usual_threshold

STEPS = ("keys", "shares", "numbers", "agreement", "reveal")
ABOUT = b"the adapter that was sent"
#: What a lying server does to a message on its way to a site: gets the site, gives what it is told instead.
Lie = Callable[[str, Any], Any]


def honest(site: str, message: Any) -> Any:
    return message


@dataclass
class Circle:
    """Sites ``names`` with keys, a roster and numbers of their own; every message crosses the wire as bytes.

    ``lost`` maps a site to the step that it does not answer any more; ``seen`` holds every byte that the server got,
    by site and step; ``progress`` what the sites keep, from which each answers every message anew.
    """

    names: tuple[str, ...]
    threshold: int = 0
    bits: int = 64
    limit: float = 8.0
    most_weight: int = 1 << 12
    length: int = 100
    run: str = "r"
    round: int = 1
    seed: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    abouts: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.keys = {name: Ed25519PrivateKey.from_private_bytes(rng.bytes(32)) for name in self.names}
        self.roster = Roster({name: key.public_key() for name, key in self.keys.items()})
        self.progress: dict[str, bytes] = {}
        for name in self.names:
            self.numbers.setdefault(name, rng.uniform(-1.2, 1.2, self.length) * self.limit)
            self.weights.setdefault(name, int(rng.integers(1, self.most_weight + 1)))

    @property
    def terms(self) -> Terms:
        return Terms(
            self.run,
            self.round,
            self.names,
            self.threshold or usual_threshold(len(self.names)),
            self.bits,  # type: ignore[arg-type]
            self.limit,
            self.most_weight,
        )

    def site(self, name: str, *, terms: Terms | None = None, roster: Roster | None = None) -> SecureSite:
        """The site as a new process finds it."""
        kept = self.progress.get(name)
        before = Progress.decode(kept, name) if kept is not None else None
        return SecureSite(terms or self.terms, name, self.keys[name], roster or self.roster, before)

    def ask(self, name: str, what: Callable[[SecureSite], Any]) -> Any:
        site = self.site(name)
        answer = what(site)
        self.progress[name] = site.progress.encode()
        return answer

    def left(self, step: str, of: Collection[str]) -> list[str]:
        gone = {name for name, when in self.lost.items() if STEPS.index(when) <= STEPS.index(step)}
        return [name for name in of if name not in gone]

    def sum(self, *, until: str = "", **lies: Lie) -> Sum:
        """Run the protocol; ``until``: the step before which it stops, with an error of the test's own."""
        self.seen: dict[tuple[str, str], bytes] = {}
        self.server = server = SecureServer(self.terms, self.length)
        lie = {step: lies.get(step, honest) for step in STEPS}

        def received(site: str, step: str, data: bytes) -> bytes:
            self.seen[site, step] = data
            return data

        for name in self.left("keys", self.names):
            data = received(name, "keys", self.ask(name, SecureSite.advertise).encode())
            server.advert(name, Advert.decode(data, name))
        for name in self.left("shares", [advert.site for advert in server.adverts.adverts]):
            told = Adverts.decode(lie["shares"](name, server.adverts).encode(), "the server")
            data = received(name, "shares", self.ask(name, lambda site, told=told: site.share(told)).encode())
            server.shared(name, Envelopes.decode(data, name))
        envelopes = server.envelopes
        for name in self.left("numbers", envelopes):
            told = Envelopes.decode(lie["numbers"](name, envelopes[name]).encode(), "the server")
            about = self.abouts.get(name, ABOUT)
            masked = self.ask(
                name,
                lambda site, told=told, name=name, about=about: site.mask(
                    told, self.numbers[name], self.weights[name], about
                ),
            )
            received(name, "numbers", masked.tobytes())
            server.masked(name, masked)
        if until == "agreement":
            raise InterruptedError
        for name in self.left("agreement", server.survivors.sites):
            told = Survivors.decode(lie["agreement"](name, server.survivors).encode(), "the server")
            data = received(name, "agreement", self.ask(name, lambda site, told=told: site.agree(told)).encode())
            server.agreed(name, Agreement.decode(data, name))
        for name in self.left("reveal", server.agreements.signatures):
            told = Agreements.decode(lie["reveal"](name, server.agreements).encode(), "the server")
            data = received(name, "reveal", self.ask(name, lambda site, told=told: site.reveal(told)).encode())
            server.revealed(name, Reveal.decode(data, name))
        return server.result()

    def integers(self, names: Collection[str]) -> list[int]:
        """The naive twin: Python's own integers, one by one, as the ring is documented."""
        levels = min(2**44, (2 ** (self.bits - 1) - 1) // len(self.names))
        totals = [0] * (self.length + 1)
        for name in names:
            for at, number in enumerate(self.numbers[name]):
                clipped = min(max(float(number), -self.limit), self.limit)
                totals[at] += round(clipped * (self.weights[name] / self.most_weight * levels / self.limit))
            totals[-1] += self.weights[name]
        return totals

    def mean(self, names: Collection[str]) -> np.ndarray:
        """The weighted mean in float64, of numbers that are clipped and not rounded."""
        clipped = {name: np.clip(self.numbers[name], -self.limit, self.limit) for name in names}
        return sum(self.weights[n] * clipped[n] for n in names) / sum(self.weights[n] for n in names)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def circle() -> Callable[..., Circle]:
    """``circle(n, **settings)``: a :class:`Circle` of ``n`` sites."""

    def make(sites: int, **settings: Any) -> Circle:
        return Circle(tuple(f"s{number:02d}" for number in range(sites)), **settings)

    return make


@pytest.fixture
def unevenness() -> Callable[[bytes], float]:
    """The p-value of Pearson's chi-squared test that the bytes are drawn evenly; 0.0 where it cannot be."""
    from scipy.stats import chisquare

    def p_value(data: bytes) -> float:
        return float(chisquare(np.bincount(np.frombuffer(data, np.uint8), minlength=256)).pvalue)

    return p_value
