"""The seam through which a PEFT method enters: one file a method, registered by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from ..core.adapter import Averaging
from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.errors import UserError
from ..core.tasks import Task


@dataclass(frozen=True)
class Method:
    """One parameter-efficient method.

    ``configure`` makes the PEFT configuration for a base model; ``meaning`` maps a trainable's name to its role and to
    what averaging it over sites means; ``prepare`` (optional) adjusts the wrapped model, such as which tensors train.
    ``uses_rank``: whether ``method.rank`` and ``method.alpha`` mean anything; ``accepts``: which of ``target_modules``,
    ``layers``, ``dropout``, ``init``, ``heads`` and ``experts`` do; ``dp``: where its exact clipping comes from.
    ``options`` enter the adapter's description: ``scaling = "sqrt"`` where the update is scaled by alpha / sqrt(r),
    ``common_rank`` where sites cannot differ in rank.

    For what PEFT has no method for: ``build`` gives the wrapped model other layers or first values, with the run's seed
    set; ``frozen`` tells which tensors belong to the adapter though they do not train, so that they cross once; within
    ``plain`` the model is one that PEFT saves to, and loads from, a folder of its own; ``attached`` is the kind of
    :class:`~.attach.AttachedAdapter` that it makes, where no folder of PEFT could hold it.
    """

    name: str
    summary: str
    source: str
    configure: Callable[[MethodConfig, Task, BaseModel], PeftConfig]
    meaning: Callable[[str], tuple[str, Averaging]]
    prepare: Callable[[PeftModel], None] | None = None
    build: Callable[[PeftModel, MethodConfig], None] | None = None
    frozen: Callable[[str], bool] | None = None
    plain: Callable[[PeftModel], AbstractContextManager[None]] | None = None
    attached: Callable[..., Any] | None = None
    uses_rank: bool = False
    accepts: frozenset[str] = frozenset()
    dp: str = "exact"
    options: Mapping[str, object] = field(default_factory=dict)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method available by its name."""
    _METHODS[method.name] = method
    return method


def methods() -> list[Method]:
    """All methods, by name."""
    return [_METHODS[name] for name in sorted(_METHODS)]


def create_method(name: str) -> Method:
    """The method called ``name``. Raises :class:`UserError` with the nearest right name."""
    if name not in _METHODS:
        near = difflib.get_close_matches(name.lower(), _METHODS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(_METHODS))}"
        raise UserError(f"unknown method `{name}`; {hint}")
    return _METHODS[name]


def require_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """``targets``, once each is known to be a module of ``model`` or the end of one's dotted name.

    Raises :class:`UserError` for the first that is not: PEFT would silently do without it.
    """
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"method.target_modules: the model has no module `{target}`")
    return list(targets)


def attention_targets(model: nn.Module, config: MethodConfig) -> list[str]:
    """Module names for low-rank updates: those asked for, else the query and value projections of the model.

    Raises :class:`UserError` when the model has none of them.
    """
    if config.target_modules:
        return require_targets(model, config.target_modules)
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for candidates in (
        ("query", "value"),
        ("q_proj", "v_proj"),
        ("c_attn",),
        ("q_lin", "v_lin"),
        ("q", "v"),
        ("query_key_value",),
    ):
        if set(candidates) <= leaves:
            return list(candidates)
    raise UserError("the model's attention projections are not known; name them in method.target_modules")
