"""AdapterFusion: trained attention over the outputs of several frozen adapters, federated like any other method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...core.adapter import AdapterState, Averaging
from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..attach import AttachedAdapter
from ..experts import require_experts
from ..peftfolder import read_folder
from ..registry import Method, register

_PREFIX = "base_model.model."
_FILE = "fusion.safetensors"
_CONFIG = "fusion.json"


class FusedLayer(nn.Module, BaseTunerLayer):
    """One layer with its frozen adapters: y = h + sum_n c_n V z_n, h = W0 x, z_n = s_n B_n A_n x.

    c = softmax over n of (Q h) . (K' z_n), with Q and K' (w, m), and V = I + U D, U (m, w), D (w, m): at a width w of
    m these are all of the paper's Q^T K and V. K' and U start at zero, so that training starts from the mean of the
    adapters' outputs. Source: Pfeiffer et al. 2021, arXiv 2005.00247, section 3.2, whose adapters are bottlenecks.
    """

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, factors: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        out = factors[0][1].shape[0]
        self.experts_a = nn.ParameterList([nn.Parameter(a, requires_grad=False) for a, _ in factors])
        self.experts_b = nn.ParameterList([nn.Parameter(b, requires_grad=False) for _, b in factors])
        self.fusion_query = nn.Linear(out, width, bias=False)
        self.fusion_key = nn.Linear(width, out, bias=False)
        self.fusion_down = nn.Linear(out, width, bias=False)
        self.fusion_up = nn.Linear(width, out, bias=False)
        nn.init.zeros_(self.fusion_key.weight)
        nn.init.zeros_(self.fusion_up.weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        h = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        outputs = torch.stack(
            [F.linear(F.linear(x, a), b) for a, b in zip(self.experts_a, self.experts_b, strict=True)], dim=-2
        )
        # (Q h) . (K' z) = (K'^T Q h) . z, and sum c_n V z_n = V sum c_n z_n: the cost does not grow with the adapters.
        asked = self.fusion_key(self.fusion_query(h))
        chances = torch.softmax((outputs * asked.unsqueeze(-2)).sum(-1), dim=-1)
        mixed = (outputs * chances.unsqueeze(-1)).sum(-2)
        return h + mixed + self.fusion_up(self.fusion_down(mixed))


class FusedAdapter(AttachedAdapter):
    """An adapter whose folder holds what PEFT has no configuration for: the fused adapters, Q, K, V and the head."""

    def save_peft(self, folder: str | Path, state: AdapterState) -> Path:
        """Write ``state`` into a folder of fedgraft's own, the frozen adapters included; PEFT cannot load it."""
        self.write(state)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        AdapterState(state.spec.bare, {name: state[name] for name in state.spec.bare.names}).save(folder / _FILE)
        text = json.dumps({"method": "adapterfusion", "adapters": _count(state)}, indent=2)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        return folder

    def load_peft(self, folder: str | Path) -> AdapterState:
        """Read what :meth:`save_peft` wrote for the same model and adapters of the same shapes."""
        if not (Path(folder) / _CONFIG).is_file():
            raise UserError(f"{folder}: holds no fused adapters: it has no {_CONFIG}")
        state = AdapterState.load(Path(folder) / _FILE).require_finite()
        if state.spec.bare.names != self.spec.bare.names:
            odd = sorted(set(state.spec.bare.names) ^ set(self.spec.bare.names))
            raise UserError(f"{folder}: tensor {odd[0] if odd else 'order'} is not of this adapter")
        try:
            self.write(state)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        return self.read()


def install(model: PeftModel, states: Sequence[AdapterState], width: int) -> None:
    """Put the frozen adapters ``states`` and what attends over them in the place of every LoRA layer of ``model``.

    The head starts from the mean of theirs.
    """
    require_experts(states)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        factors = []
        for state in states:
            pair = next((p for p in state.spec.pairs if p.a == f"{name}.lora_A.default.weight"), None)
            if pair is None:
                raise UserError(f"an adapter to fuse does not change the layer {name.removeprefix(_PREFIX)}")
            a, b = (torch.tensor(state[part]) for part in (pair.a, pair.b))
            base: Any = layer.get_base_layer()
            if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
                raise UserError(
                    f"an adapter to fuse changes {name.removeprefix(_PREFIX)} by {b.shape[0]} x {a.shape[1]}, but the "
                    f"layer is {layer.out_features} x {layer.in_features}"
                )
            factors.append((a, b * pair.scaling))
        parent, _, leaf = name.rpartition(".")
        fused = FusedLayer(base, factors, width)
        fused.to(base.weight)
        setattr(model.get_submodule(parent), leaf, fused)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            heads = [state[name] for state in states if name in state]
            if len(heads) == len(states) and all(head.shape == tuple(parameter.shape) for head in heads):
                parameter.copy_(torch.from_numpy(np.mean(heads, axis=0, dtype=np.float64)))


def _count(state: AdapterState) -> int:
    return len({name.rpartition(".")[2] for name in state if ".experts_a." in name})


def _states(config: MethodConfig) -> list[AdapterState]:
    if not config.experts:
        raise UserError("method adapterfusion attends over adapters: give their PEFT folders in method.experts")
    return [read_folder(folder).state for folder in config.experts]


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> LoraConfig:
    states = _states(config)
    require_experts(states)
    return LoraConfig(
        task_type=task.peft_type or None,
        r=1,
        target_modules=[pair.a.partition(".lora_A.")[0].removeprefix(_PREFIX) for pair in states[0].spec.pairs],
        modules_to_save=list(base.head) or None,
    )


def _build(model: PeftModel, config: MethodConfig) -> None:
    install(model, _states(config), config.rank)


def _meaning(name: str) -> tuple[str, Averaging]:
    if ".experts_" in name:
        return "basis", "nonlinear"
    return ("fusion", "nonlinear") if ".fusion_" in name else ("head", "nonlinear")


register(
    Method(
        name="adapterfusion",
        summary="attention over the outputs of frozen adapters, method.rank wide",
        source="Pfeiffer et al. 2021, arXiv 2005.00247",
        configure=_configure,
        meaning=_meaning,
        build=_build,
        frozen=lambda name: ".experts_" in name,
        attached=FusedAdapter,
        uses_rank=True,
        accepts=frozenset({"experts"}),
        options={"common_rank": True},
        equation="h + sum_n c_n V z_n, c = softmax over the adapters n of (Q h) (K z_n)",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; 4 w m numbers a layer; the fused adapters have paid their own",
        kind="adapter",
        merges=False,
    )
)
