"""HyperFormer++: one small network writes the adapters of all places from what they are."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..bottleneck import ACTIVATIONS, Activation
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register


class HyperOptions(MethodOptions):
    """``width``: of the adapters; ``embedding``: of task, layer and position, and of what they become together."""

    width: int = Field(24, ge=1, description="dimensions of the bottleneck")
    embedding: int = Field(64, ge=1, description="dimensions of the embeddings")
    hidden: int = Field(128, ge=1, description="dimensions within the network that joins the embeddings")
    activation: Activation = Field("gelu", description="nonlinearity of the bottleneck")


class HyperNetwork(nn.Module):
    """I = W2 relu(W1 [z; l_i; p_j] + b1) + b2 for layer i and position j, and from it all that an adapter has.

    One task, so one z. Norms are written as zero at first, and with them the base's function stays as it is.
    """

    def __init__(self, layers: int, positions: int, width: int, options: HyperOptions) -> None:
        super().__init__()
        size = options.embedding
        self.task = nn.Parameter(torch.randn(size))
        self.layers = nn.Parameter(torch.randn(layers, size))
        self.positions = nn.Parameter(torch.randn(positions, size))
        self.join = nn.Sequential(nn.Linear(3 * size, options.hidden), nn.ReLU(), nn.Linear(options.hidden, size))
        self.shapes = {
            "down": (options.width, width),
            "down_bias": (options.width,),
            "up": (width, options.width),
            "up_bias": (width,),
            "norm": (width,),
            "norm_bias": (width,),
        }
        self.write = nn.ModuleDict()
        for key, shape in self.shapes.items():
            writer = nn.Linear(size, torch.Size(shape).numel(), bias=False)
            nn.init.normal_(writer.weight, std=0.0 if "norm" in key else 0.01)
            self.write[key] = writer

    def forward(self, layer: int, position: int) -> dict[str, torch.Tensor]:
        joined = self.join(torch.cat([self.task, self.layers[layer], self.positions[position]]))
        return {key: self.write[key](joined).view(shape) for key, shape in self.shapes.items()}


class WrittenAdapter(Part):
    """h + LN(U act(D h + b) + c), everything in it, the norm's weight and bias too, written by the network."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        places = setting.config.places
        # PEFT keeps no order of the places.
        layers = sorted({_layer(path) for path in places})
        positions = sorted(set(places.values()))
        width = hidden_width(setting.model)
        network: Any = setting.shared(
            "network", lambda: HyperNetwork(len(layers), len(positions), width, setting.options)
        )
        self.network = network
        self.at = layers.index(_layer(setting.path)), positions.index(places[setting.path])
        self.activation = ACTIVATIONS[setting.options.activation]

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = base(*args, **kwargs)
        own = self.network(*self.at)
        x = h.to(own["down"].dtype)
        out = F.linear(self.activation(F.linear(x, own["down"], own["down_bias"])), own["up"], own["up_bias"])
        return h + F.layer_norm(out, out.shape[-1:], own["norm"], own["norm_bias"]).to(h.dtype)


def _layer(path: str) -> str:
    """The part of a module's path that says which layer of which tower it is in."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found[0] if found else path


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places: dict[str, str] = {}
    for layer in layers_of(base.model):
        places |= dict(zip((a.output for a in layer.attentions), ("attention", "cross"), strict=False))
        places[layer.down] = "ffn"
    return graft_config("hyperformer++", places, config, task, base)


register(
    Method(
        name="hyperformer++",
        summary="adapters after attention and feed-forward block, all written by one network for the whole model",
        source="Mahabadi et al. 2021, arXiv 2106.04489",
        equation="h <- h + LN(U act(D h + b) + c), (D, b, U, c, LN) = W I, I = MLP([task; layer i; position j])",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; e (2 d w + 3 d + w) numbers and a few more, however many layers there are",
        configure=_configure,
        meaning=meaning_by((".network.", "hypernetwork", "nonlinear")),
        parts={"attention": WrittenAdapter, "cross": WrittenAdapter, "ffn": WrittenAdapter},
        Options=HyperOptions,
        kind="adapter",
        merges=False,
        contract={"settings": {"options": {"width": 4, "embedding": 6, "hidden": 8}}},
    )
)
