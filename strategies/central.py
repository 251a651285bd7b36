"""Client-level privacy around any aggregator whose result is a sum: clipped changes, noise, and one update for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import Update
from ..core.vector import flat, moved
from ..privacy.accounting import epsilon
from ..privacy.central import CentralPlan, ClippedSum, Randomness
from ..privacy.ledger import Ledger, Limit
from .aggregator import Aggregator, Capabilities
from .wrapping import Wrapper

#: Who sent the one update that the aggregator inside sees.
TOGETHER = "all sites together"
_MEMORY = "central"
_MEMORY_SPEC = AdapterSpec(
    "central-privacy",
    tuple(TensorSpec(name, (1,), dtype="float64", policy="local") for name in ("clip", "rounds")),
)


class CentralPrivacy(Wrapper):
    """DP-FedAvg around ``inner``, whose rule it leaves as it is.

    Each answer becomes a change: its shared tensors less those that the site was sent. The clipped changes are summed;
    the round is reserved in ``ledger``, on the disk; then the sum is noised, divided by the number of sites expected,
    and handed to ``inner`` as one update of weight 1: the global adapter moved by that mean. For one update a rule that
    adds up returns that update (the contract of a strategy); whatever else it does, it knows nothing but the mean.

    ``randomness(round, purpose)`` gives what noise and sampling are drawn from: a stream of the operating system's.
    Raises :class:`UserError` for an ``inner`` that must see single updates, and for a plan that cannot be kept.

    Guarantee
    ---------
    That of :class:`~fedgraft.privacy.central.CentralPlan`, for every ``inner`` whose ``for_site`` keeps no record of
    whom it was called for: each asked site enters the sum at most once a round, ``inner`` is told no update, weight or
    metric of a site, and what it computes and remembers is computed from noised means. Non-shared tensors never enter.
    A site that does not answer, or whose numbers are not finite, adds zero. Trusted: the server.
    """

    def __init__(
        self,
        inner: Aggregator,
        config: RunConfig,
        ledger: Ledger,
        randomness: Callable[[int, str], Randomness],
    ) -> None:
        if not inner.capabilities.linear_sum:
            raise UserError(
                f"strategy `{inner.name}` does more than add updates up, so central privacy cannot bound what one site "
                "does to its result; choose one whose result is a sum (fedit, ffa), or leave central.enabled off"
            )
        super().__init__(inner)
        vars(self)["capabilities"] = Capabilities(needs_individual=True)
        self.config = config
        self.completed = 0
        self.clip = self._last_clip = config.central.clip
        self._ledger = ledger
        self._randomness = randomness
        self._sum: ClippedSum | None = None
        self._asked: frozenset[str] = frozenset()
        self._heard: set[str] = set()
        self.plan = CentralPlan.for_run(config, config.rounds)

    def replan(self) -> CentralPlan:
        """The plan for the rounds that remain after all that was spent.

        Raises :class:`UserError` when there is none.
        """
        left = max(0, self.config.rounds - self.completed)
        try:
            self.plan = CentralPlan.for_run(self.config, left, self._ledger.events())
        except UserError as error:
            if not self.completed:
                raise
            raise UserError(f"{error}; or end the run as it is: --resume with --set rounds={self.completed}") from None
        return self.plan

    def start_round(self, state: AdapterState) -> None:
        self._sum, self._asked, self._heard = None, frozenset(), set()
        number = self.completed + 1
        plan = self.replan()  # before anything is asked of a site: a round that cannot be paid for is refused
        self.inner.start_round(state)
        everybody = self.config.site_names
        # What sites share in a round is in what they are sent; for one rank it is alike for all.
        self._state, self._sent = state, self.inner.for_site(state, everybody[0])
        self._names = self._sent.spec.select("share")
        parameters = sum(self._sent.spec.by_name[name].size for name in self._names)
        self._sum = ClippedSum(plan, parameters, self.clip)
        drawn = self._randomness(number, "sampling").uniform(len(everybody)) < plan.sampling_rate
        self._asked = frozenset(site for site, taken in zip(everybody, drawn, strict=True) if taken)

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        """Each site of the run with probability ``sampling_rate``, independently, drawn when the round started."""
        return [site for site in sites if site in self._asked]

    def add(self, update: Update) -> None:
        site = update.site
        if self._sum is None or site not in self._asked:
            raise UserError(f"{site}: was not asked in this round, so its update does not count")
        if site in self._heard:
            raise UserError(f"{site}: sent a second update in one round")
        sent = self.inner.for_site(self._state, site)
        if tuple(update.state) != self._names:
            odd = min(set(update.state) ^ set(self._names), default="another order")
            raise UserError(f"{site}: its update does not hold the shared tensors ({odd})")
        for name in self._names:
            if not update.state[name].shape == sent[name].shape == self._sent[name].shape:
                raise UserError(f"{site}: tensor {name} has another shape there; central privacy needs one rank")
        try:
            self._sum.add(flat(update.state, self._names) - flat(sent, self._names))
        except UserError as error:
            raise UserError(f"{site}: {error}") from None
        self._heard.add(site)

    def result(self) -> AdapterState:
        if self._sum is None:
            raise UserError("no round of central privacy is open: there is nothing to release")
        finished, self._sum = self._sum, None
        plan = finished.plan
        self._ledger.reserve(
            plan.event,
            limits=(Limit(plan.epsilon, plan.delta, "central.epsilon"),),
            private_noise=not plan.seeded_noise_not_private,
            round=self.completed + 1,
        )
        mean, within = finished.release(self._randomness(self.completed + 1, "noise"))
        self._last_clip = finished.clip
        if plan.adaptive:
            self.clip = finished.next_clip(within)
        self.completed += 1
        self.inner.add(Update(TOGETHER, moved(self._sent, self._names, mean), 1.0))
        return self.inner.result()

    def memory(self) -> Mapping[str, AdapterState]:
        own = {"clip": np.array([self.clip]), "rounds": np.array([float(self.completed)])}
        return {**self.inner.memory(), _MEMORY: AdapterState(_MEMORY_SPEC, own)}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        """The inverse of :meth:`memory`; a checkpoint from before the first round holds none.

        Raises :class:`UserError` when the ledger holds fewer rounds than the memory: what was spent was lost.
        """
        own = memory.get(_MEMORY)
        if own is not None:
            if own.spec != _MEMORY_SPEC:
                raise UserError("the checkpoint's memory of central privacy is not one that this version wrote")
            self.clip, self.completed = float(own["clip"][0]), int(own["rounds"][0])
        self.inner.recall({name: state for name, state in memory.items() if name != _MEMORY})
        begun = self.rounds_spent
        if begun < self.completed:
            raise UserError(
                f"{self._ledger.path}: holds {begun} rounds of central privacy, the checkpoint {self.completed}; what "
                "was spent is unknown, so the run cannot go on: put the file back"
            )
        self.replan()

    # What is told of it

    @property
    def rounds_spent(self) -> int:
        """Rounds released or about to be, those that were lost included."""
        return sum(event.steps for event in self._ledger.events())

    def last_round(self) -> dict[str, float]:
        """What the line of metrics.jsonl says of the round that has just ended."""
        return {
            "clip": self._last_clip,
            "noise_multiplier": self.plan.noise_multiplier,
            "sum_noise": self.plan.sum_noise,
        }

    def section(self, parameters: int, clips: Iterable[float]) -> dict[str, Any]:
        """The ``central`` section of run.json; ``clips``: those of the completed rounds."""
        plan, spent = self.plan, self._ledger.events()
        return {
            "epsilon": epsilon(spent, plan.delta),
            "delta": plan.delta,
            "budget": plan.epsilon,
            "neighbours": "add_remove site",
            "trusted": "server",
            "sites": plan.sites,
            "rounds": sum(event.steps for event in spent),
            "sampling_rate": plan.sampling_rate,
            "clip": self.clip,
            "clips": list(clips),
            "clip_quantile": plan.clip_quantile,
            "noise_multiplier": plan.noise_multiplier,
            "sum_noise": plan.sum_noise,
            "noise_per_coordinate": plan.noise_on_mean,
            "noise_norm": plan.noise_norm(parameters),
            "private_noise": not plan.seeded_noise_not_private and self._ledger.private_noise(),
        }
