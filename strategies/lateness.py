"""Results that come when their round is over: which are still awaited, what they weigh then, and what forbids it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from .aggregator import Aggregator, Capabilities
from .changes import change, moved


def staleness_weight(age: float, exponent: float) -> float:
    """(1 + age)^-exponent: what work that is ``age`` rounds old counts, beside 1 for fresh work.

    The polynomial of Xie et al. 2019, "Asynchronous Federated Optimization", arXiv 1903.03934; FedBuff (Nguyen et al.
    2022, arXiv 2106.06639) takes exponent 1/2.
    """
    return (1.0 + age) ** -exponent


def rebased(state: AdapterState, given: AdapterState, now: AdapterState) -> AdapterState:
    """now + (state - given): what was trained from ``given``, as if it had begun at ``now``; float64 inside."""
    return moved(now, change(state, given))


@dataclass(frozen=True)
class Late:
    """A result of an earlier ``round`` that came in this one, ``age`` rounds late, or that can count no more.

    ``why`` it does not count, empty where it does; ``size`` in bytes; ``privacy``: what its site states with it.
    """

    site: str
    round: int
    age: int
    why: str = ""
    size: int = 0
    privacy: PrivacyStatement | None = None

    def record(self) -> dict[str, object]:
        """An entry of `late` in a line of metrics.jsonl."""
        entry: dict[str, object] = {"site": self.site, "round": self.round, "age": self.age, "why": self.why}
        if self.privacy is not None and self.privacy.enabled:
            entry["privacy"] = dict(vars(self.privacy))
        return entry


class Awaited:
    """The results of the last ``most`` rounds that may still come, each with what its site had been given.

    Each can be taken once. States that are equal are one object, so that memory grows with the rounds, not the sites.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._given: dict[tuple[int, int], tuple[str, AdapterState]] = {}

    def add(self, round: int, node: int, site: str, given: AdapterState) -> None:
        if self._most:
            self._given[round, node] = (site, given)

    def take(self, round: int, node: int) -> tuple[str, AdapterState] | None:
        """Whose result of ``round`` the one from ``node`` is, and what it began with; None: it is not awaited."""
        return self._given.pop((round, node), None)

    def outdated(self, round: int) -> list[Late]:
        """Give up what would be too old in ``round``."""
        why = f"it has not come in time (server.max_staleness = {self._most})"
        old = sorted(key for key in self._given if round - key[0] > self._most)
        return [Late(self._given.pop(key)[0], key[0], round - key[0], why) for key in old]


def late_refusal(config: RunConfig, can: Capabilities) -> str | None:
    """Why no late result can count in a run of ``config`` whose strategy has the capabilities ``can``; None: it can."""
    if config.server.late == "drop":
        return None
    reason = ""
    if config.central.enabled:
        reason = (
            "central.enabled: a site would count twice in a round, or in one that it was not drawn for, and central "
            "privacy accounts for neither"
        )
    elif config.secure_sum.enabled:
        reason = "secure_sum.enabled: the masks of a result cancel with those of its own round alone"
    elif odd := [pattern for pattern, policy in config.tensor_policy.items() if policy in ("odd", "even")]:
        reason = f'tensor_policy "{odd[0]}": what rests in one round and trains in the next has no change to add'
    elif can.needs_individual or not can.linear_sum:
        reason = f"strategy `{config.strategy}`: it does more with the updates than add them up"
    elif can.two_passes:
        reason = f"strategy `{config.strategy}`: it asks each site twice a round"
    elif can.resets_state or can.touches_base:
        reason = (
            f"strategy `{config.strategy}`: it makes new factors or base weights each round, and a change of the old "
            "ones means nothing to them"
        )
    if not reason:
        return None
    return f'server.late "staleness" cannot go with {reason}; set server.late = "drop"'


def require_same_tensors(rule: Aggregator, state: AdapterState, config: RunConfig) -> None:
    """Raise :class:`UserError` where late results are to count and rounds differ in what their sites send.

    A factor that rests now has no change, and one that moved while it rested makes the other's change another one; what
    is no parameter (a control variate) belongs to its round.
    """
    if config.server.late == "drop":
        return
    site, before = config.site_names[0], rule.round
    specs = []
    for number in (1, 2):
        rule.round = number
        specs.append(rule.for_site(state, site).spec)
    rule.round = before
    if specs[0] != specs[1] or any(not specs[0].by_name[name].parameter for name in specs[0].select("share")):
        raise UserError(
            f'server.late "staleness" cannot go with strategy `{config.strategy}`: what its sites send belongs to one '
            'round; set server.late = "drop"'
        )
