"""The seam through which a PEFT method enters: one file a method, registered by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

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
    ``uses_rank``: whether ``method.rank`` and ``method.alpha`` mean anything; ``dp``: where its exact clipping comes from.
    """

    name: str
    summary: str
    source: str
    configure: Callable[[MethodConfig, Task, BaseModel], PeftConfig]
    meaning: Callable[[str], tuple[str, Averaging]]
    prepare: Callable[[PeftModel], None] | None = None
    uses_rank: bool = False
    dp: str = "exact"


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
        near = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(_METHODS))}"
        raise UserError(f"unknown method `{name}`; {hint}")
    return _METHODS[name]


def attention_targets(model: nn.Module, config: MethodConfig) -> list[str]:
    """Module names for low-rank updates: those asked for, else the query and value projections of the model.

    Raises :class:`UserError` when the model has none of them.
    """
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if config.target_modules:
        for target in config.target_modules:
            if target.rsplit(".", 1)[-1] not in leaves:
                raise UserError(f"method.target_modules: the model has no module `{target}`")
        return list(config.target_modules)
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
