"""A federation in memory that needs no model and no data: what the contract suite runs a strategy on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ...core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from ...core.update import Update
from ..aggregator import Aggregator
from ..local import LocalRule, Training

_LAYER = "base_model.model.encoder.layer.{}.attention.query.{}"
_LOCAL, _PERSONAL = "site-local", "site-personal"
#: Tensors that every toy adapter has beside its own, with the policy that a run's configuration gave them.
FROZEN, OWN = "base_model.model.contract.frozen", "base_model.model.contract.own"
Arrange = Callable[[list[Update]], list[Update]]


class BrokenContractError(AssertionError):
    """A strategy does not keep what a strategy promises; the text says what."""


def toy_spec(rank: int = 4, *, pairs: bool = True) -> AdapterSpec:
    """LoRA on two layers of uneven shape, with a bias, a norm and a task head; alpha = 2 rank, so that dW = 2 B A."""
    tensors, found = [], []
    for layer, (m, n) in enumerate([(24, 20), (18, 22)] if pairs else []):
        a, b = (_LAYER.format(layer, f"lora_{factor}.default.weight") for factor in "AB")
        tensors += [
            TensorSpec(a, (rank, n), role="lora_A", averaging="product"),
            TensorSpec(b, (m, rank), role="lora_B", averaging="product"),
        ]
        found.append(LowRankPair(a, b, 2.0))
    tensors += [
        TensorSpec(_LAYER.format(0, "bias"), (24,), role="bias", averaging="linear"),
        TensorSpec("base_model.model.encoder.layer.0.LayerNorm.weight", (20,), role="norm", averaging="linear"),
        TensorSpec("base_model.model.classifier.modules_to_save.default.weight", (3, 24), role="head"),
        TensorSpec("base_model.model.classifier.modules_to_save.default.bias", (3,), role="head"),
    ]
    if not pairs:
        return AdapterSpec("bitfit", tuple(tensors))
    return AdapterSpec("lora", tuple(tensors), tuple(found), rank=rank, alpha=2.0 * rank)


def guarded(spec: AdapterSpec) -> AdapterSpec:
    """``spec`` with a tensor that the configuration froze, and one that it keeps at the sites."""
    more = (TensorSpec(FROZEN, (5,), role="bias", policy="freeze"), TensorSpec(OWN, (4,), role="bias", policy="local"))
    own = tuple(tensor for tensor in spec.tensors if tensor.parameter)
    return replace(spec, tensors=(*own, *more, *spec.extras))


def precise(spec: AdapterSpec) -> AdapterSpec:
    """``spec`` in float64, so that a wrong rule does not hide behind rounding."""
    return replace(spec, tensors=tuple(replace(tensor, dtype="float64") for tensor in spec.tensors))


@lru_cache(maxsize=4096)
def drawn(shape: tuple[int, ...], *parts: str) -> np.ndarray:
    """Normal numbers that are a function of ``parts`` alone."""
    seed = hashlib.sha256("|".join(parts).encode()).digest()
    array = np.random.default_rng(list(seed)).standard_normal(shape)
    array.flags.writeable = False
    return array


def fresh(spec: AdapterSpec, *, trained: bool = False) -> AdapterState:
    """A first adapter; B is zero as in a fresh LoRA, or with ``trained`` as if it had been trained before."""
    zero = set() if trained else {pair.b for pair in spec.pairs}
    tensors = {}
    for tensor in spec.tensors:
        array = drawn(tensor.shape, "fresh", tensor.name) / np.sqrt(max(tensor.shape[-1:], default=1))
        tensors[tensor.name] = (array * (tensor.name not in zero)).astype(tensor.dtype)
    return AdapterState(spec, tensors)


class Bench:
    """A strategy and its sites. Each site pulls its tensors towards values of its own by a few gradient steps.

    ``make`` gives a new aggregator; ``weights`` maps a site to its records, ``ranks`` to its rank. With ``alike`` all
    sites pull to the same values. ``tensor`` makes of an array what a local rule's ``direction`` is given.

    After :meth:`round`, ``state`` is the global adapter, ``sent`` maps a site to its (first) update, and ``brought``
    to its whole adapter as it trained it and as it was sent; ``second`` is what a second pass asked about, and
    ``refined`` what came of it.
    """

    steps, lr = 3, 0.2

    def __init__(
        self,
        make: Callable[[], Aggregator],
        initial: AdapterState,
        weights: Mapping[str, float],
        *,
        ranks: Mapping[str, int] | None = None,
        alike: bool = False,
        tensor: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        self.make, self.weights, self.alike, self.tensor = make, dict(weights), alike, tensor
        self.ranks = dict.fromkeys(weights, initial.spec.rank or 0) | dict(ranks or {})
        self.number = 0
        self.scored = 0
        self.memories: dict[str, dict[str, AdapterState]] = {}
        self.sent: dict[str, Update] = {}
        self.brought: dict[str, AdapterState] = {}
        self.second: AdapterState | None = None
        self.refined: dict[str, Update] = {}
        self.rule = self.aggregator()
        self.state = self.rule.prepare(initial)
        if self.state.spec.bare != initial.spec.bare or set(self.state) != set(self.state.spec.names):
            raise BrokenContractError("prepare() made another adapter of the one it was given")

    def aggregator(self) -> Aggregator:
        """A new aggregator of this federation."""
        rule = self.make()
        rule.ranks = {site: rank for site, rank in self.ranks.items() if rank}
        rule.round = self.number
        if rule.capabilities.needs_validation:
            rule.score = self._score
        return rule

    def round(self, arrange: Arrange = list, again: Arrange | None = None) -> AdapterState:
        """One round, as the server leads it; ``arrange`` may change the updates, ``again`` those of a second pass."""
        self.open()
        updates = [self.answer(site) for site in self.asked]
        self.sent = {update.site: update for update in updates}
        return self.close(arrange(updates), again or arrange)

    def open(self) -> None:
        """Begin the next round."""
        self.number += 1
        self.rule.round = self.number
        self.rule.start_round(self.state)
        sites = sorted(self.weights)
        picked = set(self.rule.asked(sites))
        self.asked = [site for site in sites if site in picked]
        if not self.asked:
            raise BrokenContractError(f"asked() leaves no site to train in round {self.number}")

    def close(self, updates: list[Update], again: Arrange = list) -> AdapterState:
        """Aggregate ``updates`` and, where the strategy has one, the second pass of their senders."""
        for update in updates:
            self.rule.add(update)
        self.refined, self.second = {}, self.rule.second_pass()
        second = self.second
        if (second is not None) != self.rule.capabilities.two_passes:
            raise BrokenContractError("second_pass() and capabilities.two_passes disagree")
        if second is not None:
            senders = [update.site for update in updates if update.site in self.weights]
            self.refined = {site: self._refine(site, second) for site in senders or self.asked}
            for update in again(list(self.refined.values())):
                self.rule.add_refined(update)
        self.state = self._merged(self.rule.result())
        return self.state

    def received(self, site: str) -> AdapterState:
        """What ``site`` is sent, once it is what a site can work with."""
        state = self.rule.for_site(self.state, site)
        rank = self.ranks[site]
        want = self.state.spec.bare.with_rank(rank) if rank else self.state.spec.bare
        if state.spec.bare != want:
            raise BrokenContractError(f"for_site() gives {site} another adapter than one of its rank {rank}")
        if set(state) != set(state.spec.names):
            raise BrokenContractError(f"for_site() gives {site} an adapter that is not whole")
        return state.require_finite()

    def answer(self, site: str) -> Update:
        """Train at ``site`` and say what it sends."""
        received, known = self.received(site), self.memories.get(site, {})
        rule = self.site_rule(site)
        start = AdapterState(received.spec, {**received, **known.get(_LOCAL, {})})
        if rule is not None:
            start = rule.begin(start, self._loss_of(site) if rule.needs_loss else None)
        trained = self._trained(site, start, rule)
        sent = rule.finish(trained, received) if rule is not None else trained
        names = received.spec.select("share")
        if sent.spec != received.spec or not set(names) <= set(sent):
            raise BrokenContractError(f"finish() does not give what {site} was to share: {', '.join(names)}")
        sent = sent.only(names)
        keep = {**(rule.remember() if rule is not None else {})}
        keep[_LOCAL] = trained.only(trained.spec.select("local"))
        personal = rule.personal() if rule is not None else None
        if personal is not None:
            own = AdapterState(received.spec, {**received, **known.get(_PERSONAL, {})})
            keep[_PERSONAL] = self._trained(site, personal.begin(own, None), personal).only(received.spec.bare.names)
        self.memories[site] = keep
        self.brought[site] = AdapterState(trained.spec, {**trained, **sent})
        loss = self._loss_of(site)(trained)
        weight = self.weights[site]
        return Update(site, sent, weight, {"records": weight, "steps": self.steps, "loss": loss})

    # Inside

    def site_rule(self, site: str) -> LocalRule | None:
        """The site's part of the strategy, made afresh each time, as at a site that was restarted."""
        known = self.memories.get(site, {})
        rule = self.make().local(Training(site, self.number, self.steps, self.lr), known)
        if rule is not None and rule.needs_loss and not self.rule.capabilities.needs_loss:
            raise BrokenContractError("the local rule needs the loss, which capabilities.needs_loss does not say")
        return rule

    def _target(self, site: str, tensor: TensorSpec) -> np.ndarray:
        # In the shape of the whole, so that a site of a lower rank wants a part of what it would want at full rank.
        whole = self.state.spec.by_name.get(tensor.name, tensor).shape
        who = "" if self.alike else site
        # Another in every round, so that what a rule adds up over rounds does not stay in the space of the first.
        target = drawn(whole, "target", who, tensor.name) + 0.5 * drawn(whole, str(self.number), who, tensor.name)
        return target[tuple(slice(n) for n in tensor.shape)]

    def _trained(self, site: str, start: AdapterState, rule: LocalRule | None) -> AdapterState:
        spec = start.spec
        able = {t.name for t in spec.tensors if t.parameter and t.policy != "freeze"}
        values = {name: array.astype(np.float64) for name, array in start.items()}
        first = dict(values)
        wrap: Callable[[np.ndarray], Any] = self.tensor or (lambda array: array)
        for step in range(self.steps):
            named = rule.trains(spec, step) if rule is not None else None
            for name in sorted(able if named is None else able & set(named)):
                direction: Any = values[name] - self._target(site, spec.by_name[name])
                if rule is not None:
                    gradient, value, begun = (wrap(a.copy()) for a in (direction, values[name], first[name]))
                    direction = np.asarray(rule.direction(name, gradient, value, begun, step))
                if direction.shape != values[name].shape:
                    raise BrokenContractError(f"direction() of {name} has another shape than its gradient")
                values[name] = values[name] - self.lr * direction
        return AdapterState(spec, {name: array.astype(start[name].dtype) for name, array in values.items()})

    def _loss_of(self, site: str) -> Callable[[AdapterState], float]:
        def loss(state: AdapterState) -> float:
            own = [tensor for tensor in state.spec.tensors if tensor.parameter]
            return float(np.mean([np.mean((state[t.name] - self._target(site, t)) ** 2) for t in own]))

        return loss

    def _score(self, state: AdapterState) -> float:
        self.scored += 1
        return float(1 / (1 + np.mean([self._loss_of(site)(state) for site in sorted(self.weights)])))

    def _refine(self, site: str, second: AdapterState) -> Update:
        rule = self.site_rule(site)
        if rule is None:
            raise BrokenContractError("a strategy of two passes needs a local rule that refines")
        state = rule.refine(second).only(second.spec.select("share"))
        return Update(site, state, self.weights[site], {"records": self.weights[site]})

    def _merged(self, result: AdapterState) -> AdapterState:
        """The next global adapter, as the server makes it of a result."""
        if set(result) != set(result.spec.names) or result.spec == self.state.spec:
            unknown = sorted(set(result) - set(self.state.spec.names))
            if unknown:
                raise BrokenContractError(f"result() holds {unknown[0]}, which the adapter does not have")
            result = AdapterState(self.state.spec, {**self.state, **result})
        if result.spec.bare != self.state.spec.bare:
            raise BrokenContractError("result() made another adapter of the one it was given")
        return result.require_finite()
