"""The seam of a strategy: what a method author writes, what it declares, and how it is found by name."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.adapter import AdapterState
from ..core.errors import UserError, one_line
from ..core.update import Update
from .local import LocalRule, Training


@dataclass(frozen=True)
class Capabilities:
    """What a strategy declares of itself, so that impossible combinations are refused before a run.

    ``linear_sum``: the result is a weighted sum of the updates, so it works under a secure sum; ``needs_individual``:
    it must see single updates; ``touches_base``: it changes the base model; ``resets_state``: it changes the
    parameterisation, so that optimizer moments become meaningless; ``heterogeneous_ranks``: sites may differ in rank;
    ``exact``: the aggregated dW equals the weighted mean of the sites' dW. ``two_passes``: a round asks each site
    twice; ``needs_validation``: the server must score adapters on data of its own (``server.validation``);
    ``needs_loss``: a site chooses by its training loss, which cannot be private.
    """

    linear_sum: bool = False
    needs_individual: bool = False
    touches_base: bool = False
    resets_state: bool = False
    heterogeneous_ranks: bool = False
    exact: bool = False
    two_passes: bool = False
    needs_validation: bool = False
    needs_loss: bool = False


class Options(BaseModel):
    """Typed options of a strategy; subclass it and name the subclass in ``Aggregator.Options``."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Aggregator(ABC):
    """One aggregation rule. A subclass needs :meth:`add` and :meth:`result`; the rest has working defaults.

    A round is: :meth:`start_round`, then :meth:`add` for each update as it comes, in the order of the sites' names,
    then :meth:`result`. Updates hold the tensors whose policy is ``share``. Nothing else may be kept of them than what
    the equation needs, so that memory does not grow with the number of sites.

    ``round`` is the number of the round that runs, from 1; ``ranks`` maps a site to its rank; ``score`` gives the
    accuracy of a whole adapter on the server's own data, where ``capabilities.needs_validation``; ``principal`` gives
    factors of the principal part of the base weights, SVD_r(W0) = s B A, by name, for the pairs of an adapter. All are
    set from outside before :meth:`prepare` or :meth:`start_round`.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities()
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()
        self.round = 0
        self.ranks: Mapping[str, int] = {}
        self.score: Callable[[AdapterState], float] | None = None
        self.principal: Callable[[AdapterState], Mapping[str, np.ndarray]] | None = None

    def prepare(self, initial: AdapterState) -> AdapterState:
        """The adapter that the federation starts from: its values, and its tensors' policies."""
        return initial

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        """What this site receives of the global ``state``, with the policies and extras that hold for it.

        What it answers has exactly this description. Nothing of the call may be kept.
        """
        return state

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule | None:
        """What a site does otherwise in its training, if anything. Runs at the site, on a fresh aggregator."""
        return None

    def start_round(self, state: AdapterState) -> None:
        """Forget the last round; ``state`` is the global adapter that the sites train from."""

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        """Which of ``sites`` train in the round that has started."""
        return sites

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take in one site's update."""

    def second_pass(self) -> AdapterState | None:
        """After all updates: what every site that answered is asked about once more; None: the round is complete."""
        return None

    def add_refined(self, update: Update) -> None:
        """Take in one site's second answer."""
        raise NotImplementedError

    @abstractmethod
    def result(self) -> AdapterState:
        """The next global adapter: at least the shared tensors, the others are kept from the last.

        One of another description (a base offset that has grown) must be whole.
        """

    def warning(self, private: bool) -> str:
        """What a person should know before a run starts, with ``private`` sites or not; empty: nothing."""
        return ""

    def memory(self) -> Mapping[str, AdapterState]:
        """What must survive a restart between rounds (moments, control variates), by name."""
        return {}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        """The inverse of :meth:`memory`."""


A = TypeVar("A", bound=type[Aggregator])
_STRATEGIES: dict[str, type[Aggregator]] = {}
_GROUP = "fedgraft.strategies"


def strategy(name: str) -> Callable[[A], A]:
    """Class decorator: make an :class:`Aggregator` available as ``strategy = "name"``."""

    def add(cls: A) -> A:
        known = _STRATEGIES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a strategy called {name} is registered already, by {known.__module__}")
        cls.name = name
        _STRATEGIES[name] = cls
        return cls

    return add


def _load(entry: EntryPoint) -> None:
    """Register the strategy that an installed package offers. Raises :class:`UserError` that names the package."""
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Aggregator)):
            raise TypeError(f"{entry.value} is not a subclass of Aggregator")
        strategy(entry.name)(cls)
    except Exception as error:  # a plugin may fail in any way
        raise UserError(
            f"strategy `{entry.name}` of the package {package} cannot be loaded: {one_line(error)}"
        ) from None


def strategies() -> dict[str, type[Aggregator]]:
    """All strategies by name: the built-in ones and those that installed packages offer."""
    for entry in entry_points(group=_GROUP):
        if entry.name not in _STRATEGIES:
            _load(entry)
    return dict(sorted(_STRATEGIES.items()))


def find_strategy(name: str) -> type[Aggregator]:
    """The class of the strategy called ``name``; ``flwr:...`` names one of Flower's. Raises :class:`UserError`.

    Of the installed packages only the one that offers ``name`` is loaded, so that another's fault does no harm.
    """
    if name.startswith("flwr:"):
        from .foreign import foreign

        return foreign(name)
    if name not in _STRATEGIES:
        offered = {entry.name: entry for entry in entry_points(group=_GROUP)}
        if name not in offered:
            raise UserError(f"unknown strategy `{name}`; {_nearest(name, {*_STRATEGIES, *offered})}")
        _load(offered[name])
    return _STRATEGIES[name]


def create_aggregator(name: str, options: Mapping[str, Any] | None = None) -> Aggregator:
    """The strategy called ``name`` with ``options`` checked. Raises :class:`UserError` in one line."""
    cls = find_strategy(name)
    try:
        return cls(cls.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("strategy_options", *(str(part) for part in first["loc"])))
        if first["type"] == "extra_forbidden":
            near = _nearest(str(first["loc"][-1]), cls.Options.model_fields)
            raise UserError(f"{key}: strategy `{name}` has no such option; {near}") from None
        raise UserError(f"{key}: {first['msg']} (strategy `{name}`)") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what ``name`` may have meant."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"there are {', '.join(known)}" if known else "it has none"
