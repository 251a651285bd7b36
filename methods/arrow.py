"""Arrow routing at work: PEFT's own router over several adapters on one base model, and the folder it is kept in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import ArrowConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from ..core.adapter import AdapterState
from ..core.basemodel import BaseModel
from ..core.errors import UserError
from .experts import carry, expert
from .peftfolder import read_folder

_ROUTER = "arrow_router"
_FILE = "arrow.json"
_PARTS = ("adapter_config.json", "adapter_model.safetensors")


def route(base: BaseModel, states: Sequence[AdapterState], *, most: int = 3, temperature: float = 1.0) -> PeftModel:
    """``base`` with all ``states`` on it (in place), every token routed to at most ``most`` of them in every layer.

    dW x = sum_i c_i s_i B_i A_i x, c = softmax of |v_i . x| / temperature over the ``most`` largest, v_i the first
    right singular vector of B_i A_i. PEFT's power iteration stops after 15 steps wherever it stands; here the vectors
    are those of an SVD. A head is not routed: the model has the mean of all heads (PEFT alone would fall back to the
    untrained one). No single folder can hold what this computes. Source: Ostapenko et al. 2024, arXiv 2405.11157.
    """
    model = carry(base, states)
    names = [expert(number) for number in range(len(states))]
    settings = ArrowConfig(top_k=min(most, len(states)), router_temperature=temperature)
    settings.task_adapter_names = names
    own = model.peft_config[names[0]]
    router = LoraConfig(
        r=own.r,  # type: ignore[attr-defined]
        target_modules=own.target_modules,  # type: ignore[attr-defined]
        modules_to_save=own.modules_to_save,  # type: ignore[attr-defined]
        arrow_config=settings,
    )
    model.add_adapter(_ROUTER, router)
    model.set_adapter(_ROUTER)
    _mean_head(model, names)
    for module in model.modules():
        if isinstance(module, LoraLayer) and _ROUTER in module.lora_A:
            _set_prototypes(module, names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _mean_head(model: PeftModel, names: Sequence[str]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".modules_to_save.{_ROUTER}." in key:
                heads = [parameters[key.replace(f".{_ROUTER}.", f".{name}.")] for name in names]
                parameter.copy_(torch.stack([head.double() for head in heads]).mean(0))


@torch.no_grad()
def _set_prototypes(layer: Any, names: Sequence[str]) -> None:
    router = layer.lora_arrow[_ROUTER]
    found = []
    for name in names:
        a, b = (factor[name].weight.double() for factor in (layer.lora_A, layer.lora_B))
        right, core = torch.linalg.qr(a.T)
        found.append(right @ torch.linalg.svd(torch.linalg.qr(b)[1] @ core.T)[2][0])
    prototypes = torch.stack(found).to(layer.lora_A[names[0]].weight)
    router.register_buffer("prototypes", prototypes, persistent=False)
    router._protos_ready = True


def write_set(
    folder: str | Path, adapters: Mapping[str, str | Path], *, most: int = 3, temperature: float = 1.0
) -> Path:
    """Keep PEFT adapter folders (by name) and how to route between them in one folder, for :func:`read_set`."""
    folder = Path(folder)
    for name, source in adapters.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            if not (Path(source) / part).is_file():
                raise UserError(f"{source}: not a PEFT adapter folder: it has no {part}")
            shutil.copyfile(Path(source) / part, target / part)
    values = {"adapters": list(adapters), "most": most, "temperature": temperature}
    (folder / _FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def read_set(folder: str | Path) -> tuple[dict[str, Path], int, float]:
    """The PEFT folders by name, ``most`` and ``temperature`` that :func:`write_set` kept."""
    path = Path(folder) / _FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names, most, temperature = list(values["adapters"]), int(values["most"]), float(values["temperature"])
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no routed adapters: it has no {_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if most < 1 or not (temperature > 0 and np.isfinite(temperature)):
        raise UserError(f"{path}: most is {most} and temperature {temperature:g}; both must be positive")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{path}: the adapter `{name}` is no name of a folder in it")
    return {name: Path(folder) / name for name in names}, most, temperature


def load_set(base: BaseModel, folder: str | Path) -> PeftModel:
    """``base`` with the adapters of a folder that :func:`write_set` made on it (in place), routed as it says."""
    folders, most, temperature = read_set(folder)
    return route(base, [read_folder(place).state for place in folders.values()], most=most, temperature=temperature)
