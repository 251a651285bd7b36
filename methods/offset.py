"""A low-rank change of the frozen base weights, as a state carries it: applied in place, and undone to the byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.adapter import AdapterState, LowRankPair, offset_a, offset_b
from ..core.errors import UserError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def module_of(pair: LowRankPair) -> str:
    """The dotted name of the adapted layer that ``pair`` belongs to."""
    return pair.a.rpartition(".lora_A.")[0]


class BaseOffset:
    """Holds the base weights of ``model`` at W = W0 + U V, with the factors U, V of the last state that it was given.

    W is always computed from W0 itself, of which a copy is kept (in main memory) for the layers that have an offset
    and as long as they have one: sums and differences in floating point would not lead back to W0.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._original: dict[str, torch.Tensor] = {}
        self._applied: dict[str, str] = {}

    def apply(self, state: AdapterState) -> None:
        """Bring every base weight to what ``state`` says: W0 + offset, or W0 where it has no offset.

        Raises :class:`UserError` for a layer whose weight cannot be changed, before any weight is; ``state`` must be
        whole.
        """
        changes = {module_of(pair): pair for pair in state.spec.pairs if offset_a(pair) in state.spec.by_name}
        if not changes and not self._applied:
            return
        weights = {layer: self._weight(layer) for layer in {**changes, **self._applied}}
        with torch.no_grad():
            for layer in [layer for layer in self._applied if layer not in changes]:
                weights[layer].copy_(self._original.pop(layer))
                del self._applied[layer]
            for layer, pair in changes.items():
                left, right = state[offset_b(pair)], state[offset_a(pair)]
                digest = _digest(left, right)
                if self._applied.get(layer) == digest:
                    continue
                weight = weights[layer]
                if layer not in self._original:
                    self._original[layer] = weight.detach().to("cpu", copy=True)
                wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
                change = _tensor(left, weight.device, wide) @ _tensor(right, weight.device, wide)
                if pair.fan_in_fan_out:
                    change = change.T
                weight.copy_(self._original[layer].to(weight.device, wide) + change)
                self._applied[layer] = digest

    def _weight(self, layer: str) -> torch.Tensor:
        """The base weight of ``layer``. Raises :class:`UserError` unless it is a matrix of its own that can change."""
        module: Any = self._model.get_submodule(layer)
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight: Any = getattr(base, "weight", None)
        if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in _FLOATS or weight.ndim != 2:
            kind = str(getattr(weight, "dtype", "")).removeprefix("torch.") or "unknown kind"
            raise UserError(
                f"layer {layer}: this strategy changes base weights, and those of {type(base).__name__} ({kind}) are "
                "quantised or no plain matrix; load the base model unquantised, or choose a strategy that leaves it "
                "alone"
            )
        if layer not in self._applied:
            names = [name for name, p in self._model.named_parameters(remove_duplicate=False) if p is weight]
            if len(names) > 1:
                raise UserError(
                    f"layer {layer}: this strategy changes base weights, and this one is also {_other(names, layer)}; "
                    "leave the layer out of method.target_modules"
                )
        found: torch.Tensor = weight
        return found


def _other(names: list[str], layer: str) -> str:
    return next((name for name in names if not name.startswith(f"{layer}.")), names[-1])


def _digest(left: np.ndarray, right: np.ndarray) -> str:
    total = hashlib.sha256(f"{left.shape}{left.dtype}{right.dtype}".encode())
    total.update(np.ascontiguousarray(left).data)
    total.update(np.ascontiguousarray(right).data)
    return total.hexdigest()


def _tensor(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # torch will not wrap read-only memory.
    return torch.from_numpy(array.copy()).to(device, dtype)


def fold_into_folder(folder: Path, state: AdapterState) -> None:
    """Give the PEFT LoRA folder of ``state`` its offset as further rank: s [B, U / s] [A; V] = s B A + U V.

    Rank and alpha of such a layer stand in the configuration's patterns, so that its scaling s stays.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    for pair in state.spec.pairs:
        if offset_a(pair) not in state:
            continue
        # In a folder PEFT leaves the adapter's name out.
        a, b = f"{module_of(pair)}.lora_A.weight", f"{module_of(pair)}.lora_B.weight"
        right, left = torch.tensor(state[offset_a(pair)]), torch.tensor(state[offset_b(pair)].astype(np.float64))
        tensors[a] = torch.cat([tensors[a], right.to(tensors[a])], dim=0)
        tensors[b] = torch.cat([tensors[b], (left / pair.scaling).to(tensors[b])], dim=1).contiguous()
        rank = tensors[a].shape[0]
        # With ^ a pattern is this layer alone and no other whose name ends so.
        layer = "^" + module_of(pair).removeprefix("base_model.model.")
        ranks[layer] = rank
        alphas[layer] = pair.scaling * (rank**0.5 if config.get("use_rslora") else rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
