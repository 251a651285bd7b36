"""Which layer answers for which trainable: where the engine takes over a model's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers.pytorch_utils import Conv1D

from ...core.errors import UserError
from .ghost import LARGE

_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


@dataclass(frozen=True)
class Unit:
    """A module whose forward pass the engine takes over, and how.

    ``kind``: "linear", "conv1d", "norm" or "embedding" for a plain layer with a rule of its own; "prefix" and "prompt"
    for virtual tokens; "meeting" for any other layer.
    """

    path: str
    module: nn.Module
    kind: str
    parameters: tuple[nn.Parameter, ...]


def plan(model: nn.Module, modules: Mapping[str, nn.Module], trainables: Mapping[str, nn.Parameter]) -> list[Unit]:
    """The units of ``model`` among its ``modules``.

    Raises :class:`UserError` that names the first trainable that no unit can answer for.
    """
    names = {id(parameter): name for name, parameter in trainables.items()}
    chosen: dict[int, tuple[str, nn.Module, str]] = {}
    loose: list[nn.Parameter] = []
    virtual = _virtual_tokens(model)
    for path, module in modules.items():
        own = [p for p in module._parameters.values() if p is not None and id(p) in names]
        if not own:
            continue
        if virtual is not None and path.startswith("prompt_encoder."):
            chosen[id(virtual[1])] = virtual
            continue
        unit = _unit_of(path, module, modules)
        if unit is None:
            loose.extend(own)
            continue
        if isinstance(unit[1], _NormBase):
            raise refusal(names[id(own[0])], f"{type(unit[1]).__name__} normalises over records")
        chosen[id(unit[1])] = unit
    units = []
    covered: set[int] = set()
    for path, module, kind in chosen.values():
        if _inside_another(path, chosen, modules):
            continue
        # A plain layer runs with its own tensors; any other with all that is in it.
        whole = kind in ("meeting", "prefix")
        parameters = tuple(p for p in module.parameters(recurse=whole) if id(p) in names)
        if kind == "prompt":
            parameters = tuple(p for p in module.prompt_encoder.parameters() if id(p) in names)  # type: ignore[union-attr]
        units.append(Unit(path, module, kind, parameters))
        covered.update(map(id, parameters))
    for identity, name in names.items():
        if identity not in covered:
            loosely = any(id(parameter) == identity for parameter in loose)
            raise refusal(name, "no layer that runs owns it" if loosely else "no layer of the model owns it")
    _require_one_kind(units, names)
    return units


def _unit_of(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[str, nn.Module, str] | None:
    """The unit that answers for what ``module`` itself owns; None when only containers do."""
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        above = ".".join(parts[:length])
        candidate = modules[above]
        if isinstance(candidate, BaseTunerLayer) and not _is_plain(candidate):
            return above, candidate, "meeting"
    if isinstance(module, _CONTAINERS):
        for length in range(len(parts) - 1, 0, -1):
            above = ".".join(parts[:length])
            if isinstance(modules[above], BaseTunerLayer) or _runs_itself(modules, parts[:length]):
                return above, modules[above], "meeting"
        return None
    return path, module, _kind(module)


def _is_plain(layer: BaseTunerLayer) -> bool:
    """Whether all that trains in a tuner's layer sits in plain layers that run on the records alone."""
    if isinstance(layer, LNTuningLayer) or getattr(layer, "parts_run", False):
        return True
    if not isinstance(layer, LoraLayer) or layer.lora_variant:
        return False
    plain = (nn.Linear, nn.Conv2d, nn.Sequential)  # what is in a sequence answers for itself
    parts = [part for table in (layer.lora_A, layer.lora_B) for part in table.values()]
    return type(layer).__module__ == LoraLayer.__module__ and all(isinstance(part, plain) for part in parts)


def _runs_itself(modules: Mapping[str, nn.Module], parts: Sequence[str]) -> bool:
    """Whether a module lies within a tuner's layer whose ``parts_run``: modules that are called, not read."""
    within = (modules[".".join(parts[:length])] for length in range(1, len(parts)))
    return not isinstance(modules[".".join(parts)], _CONTAINERS) and any(
        getattr(module, "parts_run", False) for module in within
    )


def _kind(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "meeting"  # somebody has put another in its place
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    if type(module) is nn.LayerNorm:
        return "norm"
    if type(module) is nn.Embedding and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse):
        return "embedding"
    return "meeting"


def _virtual_tokens(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """Where the virtual tokens of a prompt method come from."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    kind = model.active_peft_config.peft_type
    if kind in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        return f"prompt_encoder.{model.active_adapter}", model.prompt_encoder[model.active_adapter], "prefix"
    if kind in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        return "", model, "prompt"
    return None


def _inside_another(path: str, chosen: Mapping[int, Any], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a unit lies within another, which then answers for all of it; a prompt's answers for its own only."""
    parts = path.split(".")
    for length in range(len(parts) if path else 0):
        above = modules[".".join(parts[:length])]
        if id(above) in chosen and chosen[id(above)][2] != "prompt":
            return True
    return False


def _require_one_kind(units: list[Unit], names: Mapping[int, str]) -> None:
    """Large matrices are kept as factors, or as looked-up rows: a tie of both kinds is refused by name."""
    kinds: dict[int, set[str]] = {}
    for unit in units:
        for parameter in unit.parameters:
            if parameter.numel() > LARGE:
                kind = {"linear": "matrix", "conv1d": "matrix", "embedding": "table"}.get(unit.kind, "other")
                kinds.setdefault(id(parameter), set()).add(kind)
    for identity, found in kinds.items():
        if len(found) > 1:
            raise refusal(
                names[identity], "it is too large to be written out for each example, and shared by layers of two kinds"
            )


def refusal(name: str, why: str) -> UserError:
    return UserError(
        f"tensor {name} has no exact per-sample gradient ({why}), so it cannot be trained with privacy; "
        "leave it frozen, or choose another method"
    )
