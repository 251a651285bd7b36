"""What there is to know of one PEFT method before it is chosen: its equation, its options, what it trains where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..core.adapter import AdapterSpec
from ..core.config import MethodConfig
from ..core.errors import UserError
from ..methods import Method, create_method
from .strategy_card import kind_of
from .traffic import Skeleton


@dataclass(frozen=True)
class Count:
    """Numbers that ``method`` trains on a model: of the adapter itself, of the task's head, and frozen ones beside.

    ``shared``: bytes a site sends each round in fp32; ``once``: bytes of what crosses a single time; ``linear``:
    whether the mean of two adapters is the mean of what they do. ``refused``: why the method does not fit the model.
    """

    method: str
    adapter: int = 0
    head: int = 0
    frozen: int = 0
    linear: bool = False
    refused: str = ""

    @property
    def trained(self) -> int:
        return self.adapter + self.head

    @property
    def shared(self) -> int:
        return 4 * self.trained

    @property
    def once(self) -> int:
        return 4 * self.frozen


def row(method: Method) -> dict[str, Any]:
    """One method as `fedgraft methods --json` lists it."""
    keys = ("name", "kind", "summary", "equation", "source", "federates", "privacy", "dp", "merges", "refused")
    return {key: getattr(method, key) for key in keys}


def count(method: Method, on: Skeleton, **settings: Any) -> Count:
    """What ``method`` trains on a model; ``settings``: of ``[method]``."""
    try:
        return count_of(on.attach(MethodConfig(name=method.name, **settings)).spec)
    except UserError as error:
        return Count(method.name, refused=str(error))


def count_of(spec: AdapterSpec) -> Count:
    """The numbers of an adapter, by what becomes of them."""
    frozen = sum(tensor.size for tensor in spec.tensors if tensor.policy == "freeze")
    head = sum(tensor.size for tensor in spec.tensors if tensor.policy != "freeze" and tensor.role == "head")
    own = [tensor for tensor in spec.tensors if tensor.policy != "freeze" and tensor.role != "head"]
    linear = all(tensor.averaging == "linear" for tensor in own)
    return Count(spec.method, spec.parameters - frozen - head, head, frozen, linear)


def counts(
    methods: Iterable[Method], on: Skeleton, told: Callable[[str], None] = lambda name: None
) -> dict[str, Count]:
    """:class:`Count` of each method, by name; ``told`` hears which comes next."""
    found = {}
    for method in methods:
        told(method.name)
        found[method.name] = count(method, on)
    return found


def card(name: str, on: Skeleton, **settings: Any) -> dict[str, Any]:
    """Everything `fedgraft methods show` prints. Raises :class:`UserError` for an unknown name."""
    method = create_method(name)
    found = row(method) | {"options": options(method), "accepts": accepted(method)}
    if method.refused:
        return found
    counted = count(method, on, **settings)
    model = {"name": on.name, "parameters": on.base.parameters}
    if counted.refused:
        return found | {"model": model, "count": {"refused": counted.refused}}
    return found | {
        "model": model,
        "count": {
            "adapter": counted.adapter,
            "head": counted.head,
            "frozen": counted.frozen,
            "percent": 100 * counted.trained / on.base.parameters,
            "bytes_up_round": counted.shared,
            "bytes_once": counted.once,
        },
    }


def accepted(method: Method) -> list[str]:
    """The keys of ``[method]`` that mean anything to it, beside ``name`` and ``options``."""
    found = [key for key, means in (("rank", method.uses_rank), ("alpha", method.scaled)) if means]
    if method.kind == "prompt":
        found.append("virtual_tokens")
    return [*found, *sorted(method.accepts)]


def options(method: Method) -> list[dict[str, Any]]:
    """What ``[method.options]`` may hold: name, kind, default, and what it is."""
    return [
        {
            "name": name,
            "kind": kind_of(field.annotation),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "description": field.description or "",
        }
        for name, field in method.Options.model_fields.items()
    ]
