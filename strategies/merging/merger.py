"""The seam of a merging rule: what it is given, what it gives back, what it needs, and how it is found by name."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from ...core.adapter import AdapterSpec, AdapterState
from ...core.errors import UserError
from ..aggregator import Options

Heads = Literal["mean", "first"]


@dataclass(frozen=True)
class Adapter:
    """One adapter to merge: whole, under a name that tells it from the others, with a weight that says how much.

    Adapters may differ in rank and scaling, and in which modules they change: a pair that one lacks is dW = 0 there.
    """

    name: str
    state: AdapterState
    weight: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What a rule must be told beside the adapters; each names a field of :class:`Context`."""

    score: bool = False
    loss: bool = False
    embeddings: bool = False
    fisher: bool = False
    grams: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Context:
    """What is known beside the adapters.

    ``spec`` describes the result (its rank, its scaling; see :func:`.mixing.common_spec`); every state that ``score``
    and ``loss`` are asked about has it. ``start``: the adapter that all of them were trained from, where its dW is not
    zero; what is merged then is the change since. ``seed``: of whatever a rule draws. ``score`` (higher is better) and
    ``loss`` (lower is better) are of a whole adapter on the merging side's own records, and ``labels`` is how many of
    them there are. ``embeddings`` maps an adapter's name to vectors of texts that it was trained for, (texts, d), each
    of length one, or to their mean alone, (1, d), with ``noise`` on each
    coordinate (a standard deviation, by name); ``texts`` are those of the texts that the merged adapter is for.
    ``fisher`` maps a name to the diagonal Fisher information of each of its tensors, one number a parameter, in the
    adapter's own description; ``grams`` maps a name to the Gram matrix X^T X (n, n) of the inputs of each of its
    pairs, by the pair's ``a``. ``heads``: whether the task heads are averaged or the first adapter's is kept.
    """

    spec: AdapterSpec
    start: AdapterState | None = None
    seed: int = 0
    heads: Heads = "mean"
    score: Callable[[AdapterState], float] | None = None
    loss: Callable[[AdapterState], float] | None = None
    labels: int = 0
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    texts: np.ndarray | None = None
    fisher: Mapping[str, AdapterState] = field(default_factory=dict)
    grams: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """The one adapter that came of several, in the description of ``Context.spec``.

    ``weights`` and ``reasons`` say for every adapter how much of it went in, and why; ``lost`` is the relative
    Frobenius error of the merged dW, over all pairs, against what the rule gives without a limit on the rank.
    ``notes``: what else the person who merges should know, a line each.
    """

    state: AdapterState
    weights: Mapping[str, float]
    reasons: Mapping[str, str]
    lost: float = 0.0
    notes: tuple[str, ...] = ()


class Merger(ABC):
    """One rule that makes one adapter of several, without further training of them.

    ``equation`` is the rule in symbols.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs()
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abstractmethod
    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        """Merge ``adapters``: at least one, names unique, weights positive. One alone comes back as itself."""

    def warning(self, private: bool) -> str:
        """What a person should know before merging adapters (``private``: trained with DP noise); empty: nothing."""
        return ""


M = TypeVar("M", bound=type[Merger])
_MERGERS: dict[str, type[Merger]] = {}


def merger(name: str) -> Callable[[M], M]:
    """Class decorator: make a :class:`Merger` available as ``fedgraft merge NAME``."""

    def add(cls: M) -> M:
        cls.name = name
        _MERGERS[name] = cls
        return cls

    return add


def mergers() -> dict[str, type[Merger]]:
    """All rules by name."""
    return dict(sorted(_MERGERS.items()))


def create_merger(name: str, options: Mapping[str, Any] | None = None) -> Merger:
    """The rule called ``name`` with ``options`` checked. Raises :class:`UserError` in one line."""
    if name not in _MERGERS:
        raise UserError(f"unknown merging rule `{name}`; {_nearest(name, _MERGERS)}")
    cls = _MERGERS[name]
    try:
        return cls(cls.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"rule `{name}` has no option `{key}`; {_nearest(key, cls.Options.model_fields)}") from None
        raise UserError(f"option `{key}` of rule `{name}`: {first['msg']}") from None


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"there are {', '.join(sorted(known))}" if known else "it has none"
