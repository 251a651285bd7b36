"""The seam through which a PEFT method enters: one file a method, registered by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from ..core.adapter import Averaging
from ..core.basemodel import BaseModel as Base
from ..core.config import MethodConfig
from ..core.errors import UserError, one_line
from ..core.tasks import Task

#: Where a method of the surveys belongs (Xu et al. 2023, arXiv 2312.12148, figure 2).
Kind = Literal["adapter", "prompt", "other additive", "partial", "low-rank", "other reparameterised", "hybrid", "whole"]
#: What a tensor is for, and what averaging it over sites means.
Meaning = tuple[str, Averaging]
_GROUP = "fedgraft.methods"


class MethodOptions(BaseModel):
    """Typed options of a method, ``[method.options]`` of a job: subclass it, and name that in ``Method.Options``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Method:
    """One parameter-efficient method.

    ``configure`` makes the PEFT configuration for a base model; ``meaning`` maps a trainable's name to its role and to
    what averaging it over sites means; ``prepare`` (optional) adjusts the wrapped model, such as which tensors train.
    ``uses_rank``: whether ``method.rank`` means anything; ``uses_alpha``: whether ``method.alpha``
    does, where that is another answer.
    ``accepts``: which of ``target_modules``, ``layers``, ``dropout``, ``init``, ``heads``, ``experts``, ``mask`` and,
    where the kind is no prompt, ``virtual_tokens`` do. ``Options``: what ``[method.options]`` may hold. ``dp``: where
    its exact clipping comes from. ``options`` enter the adapter's description: ``scaling = "sqrt"`` where the update is
    scaled by alpha / sqrt(r), ``common_rank`` where sites cannot differ in rank.

    ``equation``, ``federates`` (what averaging over sites does to it) and ``privacy`` (what differential privacy costs
    it) are said by ``fedgraft methods show``. ``refused``: why nothing can be trained with it; it is then listed alone.
    ``merges``: whether the adapter can become part of the base weights. ``recomputes``: whether layers may be run a
    second time in the backward pass, as `train.gradient_checkpointing` has them. ``contract``: how
    :class:`fedgraft.simulations.contract.MethodContract` tries the method, by its attributes.

    For what PEFT has no method for: ``build`` gives the wrapped model other layers or first values, with the run's seed
    set; ``frozen`` tells which tensors belong to the adapter though they do not train, so that they cross once; within
    ``plain`` the model is one that PEFT saves to, and loads from, a folder of its own; ``attached`` is the kind of
    :class:`~.attach.AttachedAdapter` that it makes, where no folder of PEFT could hold it; ``steps`` is what the method
    does at each step of a training, see :class:`~.steps.Steps`. ``parts``: the layers of a method that is built on
    :mod:`.grafts`, by what a place of the base model is called in its configuration.
    """

    name: str
    summary: str
    source: str
    configure: Callable[[MethodConfig, Task, Base], PeftConfig]
    meaning: Callable[[str], Meaning]
    prepare: Callable[[PeftModel], None] | None = None
    build: Callable[[PeftModel, MethodConfig], None] | None = None
    frozen: Callable[[str], bool] | None = None
    plain: Callable[[PeftModel], AbstractContextManager[None]] | None = None
    attached: Callable[..., Any] | None = None
    steps: Callable[..., Any] | None = None
    parts: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    uses_rank: bool = False
    uses_alpha: bool | None = None
    accepts: frozenset[str] = frozenset()
    dp: str = "exact"
    options: Mapping[str, object] = field(default_factory=dict)
    Options: type[MethodOptions] = MethodOptions
    kind: Kind = "low-rank"
    equation: str = ""
    federates: str = ""
    privacy: str = ""
    refused: str = ""
    merges: bool = True
    recomputes: bool = True
    contract: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scaled(self) -> bool:
        """Whether ``method.alpha`` means anything."""
        return self.uses_rank if self.uses_alpha is None else self.uses_alpha

    def options_of(self, config: MethodConfig) -> Any:
        """``method.options`` as the method declares them. Raises :class:`UserError` that names the first wrong one."""
        try:
            return self.Options.model_validate(dict(config.options))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(("method.options", *(str(part) for part in first["loc"])))
            if first["type"] == "extra_forbidden":
                near = _nearest(str(first["loc"][-1]), self.Options.model_fields)
                raise UserError(f"{key}: method `{self.name}` has no such option; {near}") from None
            raise UserError(f"{key}: {first['msg']} (method `{self.name}`)") from None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method available by its name. Raises :class:`ValueError` where another one has the name."""
    known = _METHODS.get(method.name)
    if known is not None and known.configure.__module__ != method.configure.__module__:
        raise ValueError(f"a method called {method.name} is registered already, by {known.configure.__module__}")
    _METHODS[method.name] = method
    return method


@cache
def _catalogue() -> None:
    """Load every file of the catalogue: each registers what it holds."""
    package = importlib.import_module(f"{__package__}.catalogue")
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)


def _offered() -> dict[str, EntryPoint]:
    """The methods that installed packages offer, by name."""
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _load(entry: EntryPoint) -> None:
    """Register the method that an installed package offers. Raises :class:`UserError` that names the package."""
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        method = entry.load()
        if not isinstance(method, Method) or method.name != entry.name:
            raise TypeError(f"{entry.value} is not the Method called {entry.name}")
        register(method)
    except Exception as error:  # a plugin may fail in any way
        raise UserError(f"method `{entry.name}` of the package {package} cannot be loaded: {one_line(error)}") from None


def methods() -> list[Method]:
    """All methods by name: those of the catalogue and those that installed packages offer."""
    _catalogue()
    for name, entry in _offered().items():
        if name not in _METHODS:
            _load(entry)
    return [_METHODS[name] for name in sorted(_METHODS)]


def create_method(name: str) -> Method:
    """The method called ``name``. Raises :class:`UserError` with the nearest right name.

    Of the installed packages only the one that offers ``name`` is loaded, so that another's fault does no harm.
    """
    _catalogue()
    if name not in _METHODS:
        offered = _offered()
        if name not in offered:
            known = [*_METHODS, *offered]
            raise UserError(
                f"unknown method `{name}`; {_nearest(name, known, '`fedgraft methods` lists all there are')}"
            )
        _load(offered[name])
    return _METHODS[name]


def _nearest(name: str, known: Sequence[str] | Mapping[str, object], otherwise: str = "") -> str:
    """A hint at what ``name`` may have meant, or else ``otherwise``; without that, all there are."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    if otherwise:
        return otherwise
    return f"there are {', '.join(sorted(known))}" if known else "it has none"


def meaning_by(*parts: tuple[str, str, Averaging]) -> Callable[[str], Meaning]:
    """A ``meaning`` from (part of the name, role, averaging); what has none of the parts is the task's head."""

    def meaning(name: str) -> Meaning:
        if ".modules_to_save." not in name:
            for part, role, averaging in parts:
                if part in name:
                    return role, averaging
        return "head", "nonlinear"

    return meaning


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
