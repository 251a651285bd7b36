"""Merging rules as strategies: sites train apart, for as long as they like, and are merged once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..core.adapter import AdapterState
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, strategy
from .merging import Adapter, Context, Merged, Merger
from .merging.arithmetic import TaskArithmetic
from .merging.dare import Dare
from .merging.knots import Knots
from .merging.mixing import alone, lifted
from .merging.soup import UniformSoup
from .merging.ties import Ties


class OneShot(Aggregator):
    """The next adapter is a merging rule's of the sites' adapters, counted from the one that they trained from.

    Meant for a run of one round with many local steps; in a further round, what is merged is the change of dW since the
    round began. Holds every site's adapter until the round ends. One update comes back as itself.
    """

    rule: ClassVar[type[Merger]]
    #: What a rule that trims, drops or scales must be told to give agreeing sites back what they brought.
    contract_options: ClassVar[Mapping[str, Any]] = {}
    capabilities = Capabilities(needs_individual=True, resets_state=True, heterogeneous_ranks=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rule = cls.rule
        cls.summary, cls.equation, cls.source, cls.Options = rule.summary, rule.equation, rule.source, rule.Options

    def start_round(self, state: AdapterState) -> None:
        self._start = state
        self._adapters: list[Adapter] = []
        factors = {name for pair in state.spec.pairs for name in (pair.a, pair.b)}
        odd = [t for t in state.spec.tensors if t.name in factors and t.policy != "share"]
        if odd:
            raise UserError(
                f"strategy `{self.name}` refactors what the sites send, so all low-rank factors must be shared; tensor "
                f"{odd[0].name} is set to {odd[0].policy}: change tensor_policy"
            )
        self.merged: Merged | None = None

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        rank = self.ranks.get(site, state.spec.rank)
        return state if rank is None or rank == state.spec.rank else lifted(state, state.spec.with_rank(rank))

    def add(self, update: Update) -> None:
        for name in update.state.spec.select("share"):
            if name not in update.state:
                raise UserError(f"site {update.site}: tensor {name} is missing")
        # What the policies keep from being sent is not merged; the server's own stands in for it.
        whole = update.state.require_finite().filled_from(lifted(self._start, update.state.spec))
        self._adapters.append(Adapter(update.site, whole, update.weight))

    def result(self) -> AdapterState:
        if not self._adapters:
            raise UserError("no update arrived: there is nothing to merge")
        spec = self._start.spec
        context = Context(spec, start=self._start, seed=self.round, score=self.score)
        if len(self._adapters) == 1:
            self.merged = alone(self._adapters[0], context)
        else:
            self.merged = self.rule(self.options).merge(self._adapters, context)
        return self.merged.state.only(spec.select("share"))

    def warning(self, private: bool) -> str:
        return self.rule(self.options).warning(private)


@strategy("uniform")
class UniformOneShot(OneShot):
    __doc__ = UniformSoup.__doc__
    rule = UniformSoup


@strategy("task-arithmetic")
class TaskArithmeticOneShot(OneShot):
    __doc__ = TaskArithmetic.__doc__
    rule = TaskArithmetic
    contract_options: ClassVar[Mapping[str, Any]] = {"scale": 0.25}


@strategy("ties")
class TiesOneShot(OneShot):
    __doc__ = Ties.__doc__
    rule = Ties
    contract_options: ClassVar[Mapping[str, Any]] = {"density": 1.0}


@strategy("dare")
class DareOneShot(OneShot):
    __doc__ = Dare.__doc__
    rule = Dare
    contract_options: ClassVar[Mapping[str, Any]] = {"density": 1.0}


@strategy("knots")
class KnotsOneShot(OneShot):
    __doc__ = Knots.__doc__
    rule = Knots
    contract_options: ClassVar[Mapping[str, Any]] = {"density": 1.0}
