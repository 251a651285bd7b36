"""A federation of arithmetic alone: sites with quadratic losses that train by the seam of a strategy, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, LocalRule, Training

SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 3), "float64", role="lora_A", averaging="product"),
        TensorSpec("b", (3, 2), "float64", role="lora_B", averaging="product"),
        TensorSpec("head", (2,), "float64", role="head"),
    ),
    pairs=(LowRankPair("a", "b", 2.0),),
    rank=2,
    alpha=4.0,
)


def draw(seed: int, spec: AdapterSpec = SPEC) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


@dataclass(frozen=True)
class ToySite:
    """F(y) = 1/2 sum h (y - t)^2, with h and t drawn from ``seed``; its gradients are noisy, and alike at each call."""

    name: str
    seed: int
    weight: float = 1.0
    steps: int = 3
    lr: float = 0.05
    momentum: float = 0.0
    noise: float = 0.1

    def curve(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, *name.encode()])
        return random.uniform(0.5, 2.0, shape), random.standard_normal(shape)

    def gradient(self, name: str, value: np.ndarray, round: int, step: int) -> np.ndarray:
        h, t = self.curve(name, value.shape)
        noise = np.random.default_rng([self.seed, round, step, *name.encode()])
        return h * (value - t) + self.noise * noise.standard_normal(value.shape)

    def loss(self, state: AdapterState) -> float:
        total = 0.0
        for name in state.spec.bare.names:
            h, t = self.curve(name, state[name].shape)
            total += 0.5 * float((h * (state[name] - t) ** 2).sum())
        return total

    def training(self, round: int) -> Training:
        return Training(self.name, round, self.steps, self.lr, self.momentum)

    def train(self, begun: AdapterState, rule: LocalRule | None, round: int) -> AdapterState:
        """SGD as the client's trainer does it, the rule's direction in place of each gradient."""
        start = {name: begun[name].copy() for name in begun.spec.bare.names}
        now = {name: array.copy() for name, array in start.items()}
        speed = {name: np.zeros(array.shape) for name, array in start.items()}
        for step in range(self.steps):
            asked = rule.trains(begun.spec, step) if rule is not None else None
            for name in begun.spec.bare.names:
                frozen = begun.spec.by_name[name].policy == "freeze"
                if frozen or (asked is not None and name not in asked):
                    continue
                gradient = self.gradient(name, now[name], round, step)
                if rule is not None:
                    gradient = rule.direction(name, gradient, now[name].copy(), start[name], step)
                speed[name] = self.momentum * speed[name] + gradient
                now[name] = now[name] - self.lr * speed[name]
        return AdapterState(begun.spec, {**begun, **now})


@dataclass
class Toy:
    """Plays rounds of a rule; keeps what the sites remembered and sent."""

    rule: Aggregator
    sites: Sequence[ToySite]
    memories: dict[str, dict[str, AdapterState]] = field(default_factory=dict)
    sent: list[Update] = field(default_factory=list)
    personal: dict[str, AdapterState] = field(default_factory=dict)
    round: int = 0

    spec: ClassVar[AdapterSpec] = SPEC
    site: ClassVar[type[ToySite]] = ToySite
    draw = staticmethod(draw)

    def rounds(self, state: AdapterState, count: int) -> Iterator[AdapterState]:
        for _ in range(count):
            state = self.one(state)
            yield state

    def one(self, state: AdapterState) -> AdapterState:
        self.round += 1
        rule = self.rule
        rule.round, rule.ranks = self.round, {site.name: state.spec.rank or 0 for site in self.sites}
        rule.start_round(state)
        asked = rule.asked(tuple(sorted(site.name for site in self.sites)))
        self.sent = []
        for site in sorted(self.sites, key=lambda site: site.name):
            if site.name in asked:
                self.sent.append(self._visit(site, rule.for_site(state, site.name)))
                rule.add(self.sent[-1])
        result = rule.result()
        known = {name: array for name, array in result.items() if name in state.spec.by_name}
        return AdapterState(state.spec, {**state, **known})

    def _visit(self, site: ToySite, received: AdapterState) -> Update:
        memory = self.memories.get(site.name, {})
        own = memory.get("own", {})
        mixed = AdapterState(
            received.spec, {**received, **{n: own[n] for n in received.spec.select("local") if n in own}}
        )
        # A site has an aggregator of its own, fresh every time.
        local = type(self.rule)(self.rule.options).local(site.training(self.round), memory)
        begun = mixed if local is None else local.begin(mixed, site.loss if local.needs_loss else None)
        trained = site.train(begun, local, self.round)
        beside = local.personal() if local is not None else None
        if beside is not None:
            held: Mapping[str, np.ndarray] = self.personal.get(site.name, {})
            start = beside.begin(AdapterState(received.spec, {**received, **held}))
            self.personal[site.name] = site.train(start, beside, self.round).only(received.spec.bare.names)
        answer = trained if local is None else local.finish(trained, received)
        kept = dict(local.remember()) if local is not None else {}
        self.memories[site.name] = {**kept, "own": trained.only(received.spec.select("local"))}
        shared = answer.only(received.spec.select("share"))
        return Update(site.name, shared, site.weight, {"steps": float(site.steps), "records": site.weight})


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Makes a :class:`Toy` of a rule and its sites: three of unequal weight, unless others are given."""

    def make(rule: Aggregator, sites: Sequence[ToySite] = (), **settings: Any) -> Toy:
        plain = [ToySite(name, 3 + k, weight=float(1 + 2 * k), **settings) for k, name in enumerate("pqr")]
        return Toy(rule, sites or plain)

    return make
