"""S4: four groups of layers, each with strategies of its own among adapters, prefixes, biases and low-rank updates.

The paper finds the pattern by a search through its design space: groups as a spindle (fewer layers at both ends), as
many numbers in each layer, all groups trained, and the strategies that ``groups`` has by default. It says what a
spindle is, not how many layers an end has: here it is a sixth. Adapters are Houlsby's, updates of query and value.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import Layer, layers_of, shape_of
from ..bottleneck import Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..prefixed import PrefixPart, takes_prefix
from ..registry import Method, create_method, meaning_by, register


class DesignOptions(BottleneckOptions):
    """Of the adapters; prefixes have ``method.virtual_tokens``, updates ``method.rank`` and ``method.alpha``."""

    width: int = Field(16, ge=1, description="dimensions of the bottleneck")
    groups: tuple[str, str, str, str] = Field(
        ("AL", "AP", "APB", "PBL"),
        description="strategies of each group of layers: letters of A(dapter), P(refix), B(ias), L(oRA)",
    )

    @field_validator("groups")
    @classmethod
    def _known(cls, groups: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
        for group in groups:
            if not group or not set(group) <= set("APBL") or len(set(group)) < len(group):
                raise ValueError(f"{group!r}: set each group to letters of A, P, B and L, each once")
        return groups


class Tuned(Part):
    """y = W0 x + b0 + [L: (alpha / r) B A x] + [B: db], then [A: y + U act(D y + b) + c]: by its kind's letters."""

    called = False

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.kind = setting.config.places[setting.path]
        self.scaling = setting.config.alpha / setting.config.rank
        if "L" in self.kind:
            inputs, outputs = shape_of(base)
            self.a = nn.Parameter(torch.empty(setting.config.rank, inputs))
            self.b = nn.Parameter(torch.zeros(outputs, setting.config.rank))
            nn.init.kaiming_uniform_(self.a, a=5**0.5)
        if "B" in self.kind:
            bias: Any = base.bias
            self.shift = nn.Parameter(torch.zeros(bias.shape))
        if "A" in self.kind:
            self.bottleneck = Bottleneck.of(setting)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = base(*args, **kwargs)
        if "L" in self.kind:
            y = y + self.scaling * F.linear(F.linear(args[0].to(self.a.dtype), self.a), self.b).to(y.dtype)
        if "B" in self.kind:
            y = y + self.shift.to(y.dtype)
        return y + self.bottleneck(y) if "A" in self.kind else y


def spindle(layers: int) -> list[int]:
    """The group, 0 to 3, of each of ``layers`` layers: a sixth of them at either end, the rest in two halves."""
    end = round(layers / 6)
    first = (layers - 2 * end + 1) // 2
    return [0] * end + [1] * first + [2] * (layers - 2 * end - first) + [3] * end


def _kinds(layer: Layer, letters: str, model: nn.Module) -> dict[str, str]:
    """The places of one layer whose group has the strategies ``letters``."""
    modules = dict(model.named_modules())
    by_letter = {
        "L": [path for a in layer.attentions for path in (a.query, a.value)],
        "B": [path for path in (*layer.linears, *layer.norms) if getattr(modules[path], "bias", None) is not None],
        "A": [*(a.output for a in layer.attentions), layer.down],
    }
    if "B" in letters and not by_letter["B"]:
        raise UserError(f"{type(model).__name__} has no biases: set method.options.groups to letters without B")
    kinds: dict[str, str] = {}
    for letter in (letter for letter in "LBA" if letter in letters):
        kinds |= {path: kinds.get(path, "") + letter for path in dict.fromkeys(by_letter[letter])}
    if "P" in letters:
        for attention in layer.attentions:
            if not takes_prefix(modules[attention.module]):
                raise UserError(
                    f"no prefix fits {type(model).__name__}: set method.options.groups to letters without P"
                )
            kinds[attention.module] = "P"
    return kinds


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    groups = create_method("s4").options_of(config).groups
    layers = layers_of(base.model)
    depths = Counter(layer.stack for layer in layers)
    places: dict[str, str] = {}
    for layer in layers:
        places |= _kinds(layer, groups[spindle(depths[layer.stack])[layer.index]], base.model)
    return graft_config("s4", places, config, task, base)


register(
    Method(
        name="s4",
        summary="adapters, prefixes, biases and low-rank updates, others in each of four groups of layers",
        source="Chen et al. 2023, arXiv 2301.01821",
        equation="groups of a sixth, third, third, sixth of the layers: (A, L), (A, P), (A, P, B), (P, B, L)",
        federates="averaged tensor by tensor; the mean is not the mean of the functions",
        privacy="exact clipping; about as many numbers in each layer; the groups are set, not searched for",
        configure=_configure,
        meaning=meaning_by(
            (".bottleneck.", "adapter", "nonlinear"),
            (".prefix.", "prefix", "nonlinear"),
            # An adapter behind a bias sees it.
            (".shift", "bias", "nonlinear"),
            (".a", "update_A", "product"),
            (".b", "update_B", "product"),
        ),
        parts={"P": PrefixPart, **dict.fromkeys(("L", "B", "A", "LB", "BA"), Tuned)},
        Options=DesignOptions,
        uses_rank=True,
        accepts=frozenset({"virtual_tokens"}),
        kind="hybrid",
        merges=False,
        contract={
            "settings": {"options": {"width": 8, "groups": ("AL", "APB", "PBL", "AL")}},
            "unfit": dict.fromkeys(("llama", "t5", "vit"), "method.options.groups"),
            "inert": (".key.graft.default.shift",),
        },
    )
)
