"""What the methods that PEFT lacks are made of: parts around modules of the base, as one tuner of PEFT's.

A method names the places of a base model and the :class:`Part` for each; PEFT injects, saves, loads, switches and
merges them like its own, in any process that has imported :mod:`fedgraft.methods`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from torch import nn

from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.errors import UserError
from ..core.tasks import Task
from .registry import create_method

NAME = "fedgraft"


def _extended(name: str) -> PeftType:
    """A further member of PEFT's list of types, which :func:`peft.utils.register_peft_method` asks for."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    with_members: Any = PeftType
    with_members._member_map_[name] = with_members._value2member_map_[name] = member
    with_members._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


PEFT_TYPE = PeftType[NAME.upper()] if NAME.upper() in PeftType.__members__ else _extended(NAME.upper())


@dataclass
class GraftConfig(PeftConfig):
    """A method of fedgraft's as PEFT keeps it: ``places`` maps module paths to what their part is called.

    ``sizes``: a number that a part is made by (its numbers, the heads), by module path, where nothing else says it.
    """

    method: str = ""
    places: dict[str, str] = field(default_factory=dict)
    target_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    virtual_tokens: int = 20
    mask: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_modules = self.target_modules or list(self.places)


@dataclass(frozen=True)
class Setting:
    """Where a part stands: the adapter's ``config``, the ``path`` of its module in the base model, and ``options``.

    ``model``: the base model; ``common``: what parts of one adapter have in common, by name.
    """

    config: GraftConfig
    path: str
    options: Any
    common: dict[str, nn.Module]
    notes: dict[str, Any]
    model: nn.Module

    def shared(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """What every part that asks for ``name`` holds: made by the first, counted and exchanged once."""
        if name not in self.common:
            self.common[name] = make()
        return self.common[name]

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """What every part that asks for ``name`` reads: made by the first, and no tensor of the adapter."""
        if name not in self.notes:
            self.notes[name] = make()
        return self.notes[name]

    def drawn(self, *shape: int, key: str = "") -> torch.Tensor:
        """Standard normal numbers that every site draws alike, whatever the run's seed: they never cross the wire."""
        first = next(self.model.parameters(), None)
        if first is not None and first.is_meta:
            # A model without weights is there to be counted.
            return torch.empty(*shape, device="meta")
        text = f"{self.config.method}|{self.path}|{key}|{self.config.options.get('projection_seed', 0)}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Part(nn.Module):
    """What a method puts around one module of the base: subclass it, make parameters, and compute in :meth:`forward`.

    ``frozen``: names of own parameters that belong to the adapter but never train. ``called``: every module within that
    has parameters is called with records, and none is read: exact clipping is faster then. A fresh part must leave the
    base model's function as it is, unless the method's paper says otherwise.
    """

    frozen: frozenset[str] = frozenset()
    called: bool = True

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__()

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What stands in the place of ``base(*args, **kwargs)``."""
        raise NotImplementedError

    def merged(self, base: nn.Module) -> Mapping[str, torch.Tensor]:
        """The base module's parameters with this part in them, by name; :class:`ValueError` where it cannot be."""
        raise ValueError(f"{type(self).__name__} is no change of the base weights, so it cannot be merged into them")


class GraftLayer(nn.Module, BaseTunerLayer):
    """A module of the base with the parts of adapters around it."""

    adapter_layer_names = ("graft",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.graft = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before: dict[str, torch.Tensor] = {}

    @property
    def parts_run(self) -> bool:
        """Whether exact clipping may take each module of a part for itself."""
        return all(part.called for part in self.graft.values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            # Some models look into their modules, and places may lie within one another.
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, part: Part, inference_mode: bool) -> None:
        self.graft[adapter_name] = part
        # PEFT's own asks for the base module's weight, which a block of several layers has none of.
        first = next(self.base_layer.parameters(), None)
        if first is not None:
            part.to(first.device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        for part in self.graft.values():
            for name, parameter in part.named_parameters():
                if name in part.frozen:  # type: ignore[operator]
                    parameter.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        active = [name for name in self.active_adapters if name in self.graft]
        if self.merged or not active:
            return self.base_layer(*args, **kwargs)
        if len(active) > 1:
            raise ValueError("one adapter of fedgraft's can be active at a time")
        return self.graft[active[0]](self.base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active adapter into the base module's own parameters."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.graft:
                continue
            if self.merged_adapters:
                raise ValueError("one adapter of fedgraft's can be merged at a time")
            own = dict(self.base_layer.named_parameters())
            with torch.no_grad():
                changed = self.graft[name].merged(self.base_layer)  # type: ignore[operator]
                for key, tensor in changed.items():
                    if safe_merge and not bool(torch.isfinite(tensor).all()):
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                    self._before[key] = own[key].detach().clone()
                    own[key].copy_(tensor)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Bring the base module's parameters back, to the bit."""
        own = dict(self.base_layer.named_parameters())
        with torch.no_grad():
            for key, tensor in self._before.items():
                own[key].copy_(tensor)
        self._before, self.merged_adapters = {}, []


class GraftModel(BaseTuner):
    """PEFT's tuner for every method that is built of parts."""

    prefix = "graft"
    tuner_layer_cls = GraftLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012

    def _check_target_module_exists(self, config: GraftConfig, key: str) -> bool:  # type: ignore[override]
        return key in config.places

    def _create_and_replace(  # type: ignore[override]
        self,
        config: GraftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        method = create_method(config.method)
        common = self.__dict__.setdefault("_common", {}).setdefault(adapter_name, {})
        options = method.Options.model_validate(config.options)
        notes = self.__dict__.setdefault("_notes", {}).setdefault(adapter_name, {})
        setting = Setting(config, current_key, options, common, notes, self.model)
        base = target.get_base_layer() if isinstance(target, GraftLayer) else target
        part: Any = method.parts[config.places[current_key]](base, setting)
        if not isinstance(target, GraftLayer):
            target = GraftLayer(target)
            if adapter_name not in self.active_adapters:
                target.requires_grad_(False)
            target.update_layer(adapter_name, part, config.inference_mode)
            self._replace_module(parent, target_name, target, target.base_layer)
        else:
            target.update_layer(adapter_name, part, config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own asks for a weight of the module, which a block of several layers has none of. A place within
        # another is held by that one's base.
        holder = parent.get_base_layer() if isinstance(parent, GraftLayer) else parent
        setattr(holder, child_name, new_module)


register_peft_method(name=NAME, config_cls=GraftConfig, model_cls=GraftModel, prefix=GraftModel.prefix)


def graft_config(
    method: str,
    places: Mapping[str, str],
    config: MethodConfig,
    task: Task,
    base: BaseModel,
    sizes: Mapping[str, int] | None = None,
) -> GraftConfig:
    """The PEFT configuration of ``method`` at ``places`` of a base model. Raises :class:`UserError` for no place."""
    if not places:
        raise UserError(f"method {method} finds no place in {type(base.model).__name__}; choose lora")
    options = create_method(method).options_of(config)
    return GraftConfig(
        task_type=task.peft_type or None,
        method=method,
        places=dict(places),
        modules_to_save=list(base.head) or None,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        virtual_tokens=config.virtual_tokens,
        mask=config.mask,
        sizes=dict(sizes or {}),
        options=options.model_dump(mode="json"),
    )
