"""One base model that carries several low-rank adapters side by side, each under a name of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from ..core.adapter import AdapterState
from ..core.basemodel import BaseModel
from ..core.errors import UserError

#: The tensors of a lone adapter are called so in an :class:`AdapterSpec`.
_LONE = "default"


def expert(number: int) -> str:
    """What the adapter at ``number`` is called in the model; a site's own name may hold what a module's cannot."""
    return f"expert_{number}"


def carry(base: BaseModel, states: Sequence[AdapterState]) -> PeftModel:
    """Put all ``states`` on ``base`` (in place), frozen, as ``expert_0``, ``expert_1``, ...

    Ranks may differ: the smaller factors are filled up with zeros, and each keeps its own scaling, so that every dW is
    what it was. Raises :class:`UserError` for what is no plain low-rank adapter of this model.
    """
    require_experts(states)
    rank = max(_rank(state) for state in states)
    targets = [_module(pair.a) for pair in states[0].spec.pairs]
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": targets, "inference_mode": True}
    config["modules_to_save"] = list(base.head) or None
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            model = get_peft_model(base.model, LoraConfig(**config), adapter_name=expert(0))
            for number in range(1, len(states)):
                model.add_adapter(expert(number), LoraConfig(**config))
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"the adapters do not fit {type(base.model).__name__}: {error}") from None
    for number, state in enumerate(states):
        write_expert(model, expert(number), state, rank)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def write_expert(model: PeftModel, name: str, state: AdapterState, rank: int) -> None:
    """Copy ``state`` into the adapter ``name`` of ``model``, whose factors have ``rank``."""
    parameters = dict(model.named_parameters())
    layers = {key: module for key, module in model.named_modules() if isinstance(module, LoraLayer)}
    factors = {}
    for pair in state.spec.pairs:
        own = state[pair.a].shape[0]
        factors[pair.a] = np.pad(state[pair.a], ((0, rank - own), (0, 0)))
        factors[pair.b] = np.pad(state[pair.b], ((0, 0), (0, rank - own)))
        layers[pair.a.partition(".lora_A.")[0]].scaling[name] = pair.scaling
    with torch.no_grad():
        for key, array in state.items():
            target = key.replace(f".{_LONE}.", f".{name}.")
            if target not in parameters:
                raise UserError(f"the base model has no place for tensor {key}")
            parameters[target].copy_(torch.from_numpy(np.array(factors.get(key, array))))


def require_experts(states: Sequence[AdapterState]) -> None:
    """Raise :class:`UserError` unless all are low-rank adapters of the same modules, with the same head."""
    if len(states) < 2:
        raise UserError("routing between adapters needs two or more of them")
    for state in states:
        spec = state.spec
        factors = {name for pair in spec.pairs for name in (pair.a, pair.b)}
        odd = [tensor.name for tensor in spec.tensors if tensor.name not in factors and tensor.role != "head"]
        if not factors or odd:
            raise UserError(
                f"method {spec.method} {f'has tensor {odd[0]}' if odd else 'has no low-rank factors'}: only plain "
                "low-rank adapters can lie side by side; convert the adapter to lora"
            )
        if spec.names != states[0].spec.names:
            differing = min(set(spec.names) ^ set(states[0].spec.names), default="their order")
            raise UserError(f"two adapters differ in their tensors: {differing}; train them on the same modules")


def _rank(state: AdapterState) -> int:
    return max(state[pair.a].shape[0] for pair in state.spec.pairs)


def _module(a: str) -> str:
    """The base model's name of the layer that the factor ``a`` belongs to."""
    return a.partition(".lora_A.")[0].removeprefix("base_model.model.")
