"""AutoPEFT's space: which layers have modules, and the sizes of serial adapter, parallel adapter and prefix.

Source: Zhou et al. 2024, arXiv 2301.12132, section 3.1; the grid of sizes is that of the authors' code.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ...core.errors import UserError
from ...methods.anatomy import hidden_width, layers_of
from ...methods.catalogue.autopeft import fits_prefix
from ...methods.catalogue.pfeiffer import place_of
from ...methods.prefixed import Prefix

#: The modules whose sizes are searched, in the order of their numbers in a point.
MODULES = ("serial", "parallel", "prefix")


@dataclass(frozen=True, order=True)
class Point:
    """One configuration: the layers that have modules, and how large each module is there (0: there is none)."""

    layers: tuple[int, ...]
    serial: int
    parallel: int
    prefix: int

    @property
    def method(self) -> dict[str, Any]:
        """The values of ``[method]`` that make it."""
        options = {module: getattr(self, module) for module in MODULES}
        return {"name": "autopeft", "layers": list(self.layers), "options": options}

    @property
    def overrides(self) -> str:
        """The same as ``--set`` of a command line."""
        values = {"name": "autopeft", "layers": str(list(self.layers)).replace(" ", "")}
        values |= {f"options.{module}": str(getattr(self, module)) for module in MODULES}
        return " ".join(f"--set {shlex.quote(f'method.{key}={value}')}" for key, value in values.items())


def sizes_up_to(width: int) -> tuple[int, ...]:
    """None, and ``width`` halved again and again down to 1: for 768 the paper's 0, 1, 3, 6, 12, ... 384, 768."""
    return (0, *sorted({width >> halvings for halvings in range(width.bit_length())}))


@dataclass(frozen=True)
class Space:
    """The configurations of one base model.

    ``layers``: of each number of a layer, how many layers have it (two in an encoder-decoder). ``keys``: of each, the
    numbers that one more key and value take in all its attentions. ``sizes``: by module, ascending, 0 first.
    """

    width: int
    layers: Mapping[int, int]
    keys: Mapping[int, int]
    sizes: Mapping[str, tuple[int, ...]]

    def drawn(self, random: np.random.Generator) -> Point:
        """A point with each layer as likely in as out and each size as likely as another, as the paper begins."""
        while True:
            chosen = tuple(layer for layer in self.layers if random.random() < 0.5)
            point = Point(chosen, *(int(random.choice(self.sizes[module])) for module in MODULES))
            if self.trains(point):
                return point

    def neighbours(self, point: Point) -> Iterator[Point]:
        """Every point that differs in one layer or in one size."""
        for layer in self.layers:
            changed = replace(point, layers=tuple(sorted({*point.layers} ^ {layer})))
            if self.trains(changed):
                yield changed
        for module in MODULES:
            for size in self.sizes[module]:
                sizes: dict[str, Any] = {module: size}
                changed = replace(point, **sizes)
                if size != getattr(point, module) and self.trains(changed):
                    yield changed

    def trains(self, point: Point) -> bool:
        """Whether there is any module."""
        return bool(point.layers) and any(getattr(point, module) for module in MODULES)

    def numbers(self, point: Point) -> int:
        """How many numbers train beside the head, as :func:`~fedgraft.methods.attach` would count them."""
        adapters = sum(2 * self.width * size + self.width + size for size in (point.serial, point.parallel) if size)
        return sum(self.layers[layer] * adapters + self.keys[layer] * point.prefix for layer in point.layers)

    @property
    def most(self) -> int:
        """The numbers of the largest configuration."""
        return self.numbers(Point(tuple(self.layers), *(self.sizes[module][-1] for module in MODULES)))

    def encoded(self, points: Sequence[Point]) -> np.ndarray:
        """(points, layers + 3) from 0 to 1: a bit a layer, and where each size stands among those there are."""
        rows = np.empty((len(points), len(self.layers) + len(MODULES)))
        for row, point in zip(rows, points, strict=True):
            places = [self.sizes[m].index(getattr(point, m)) / max(1, len(self.sizes[m]) - 1) for m in MODULES]
            row[:] = [*(layer in point.layers for layer in self.layers), *places]
        return rows


def space_of(model: nn.Module) -> Space:
    """The space of a base model, without the modules that do not fit it; :class:`UserError` for an unknown family."""
    layers, width = layers_of(model), hidden_width(model)
    some = sizes_up_to(width)
    try:
        place_of(layers[0], model)
        serial = some
    except UserError:
        serial = (0,)
    prefix = some if fits_prefix(model) else (0,)
    keys: Counter[int] = Counter({layer.index: 0 for layer in layers})
    if len(prefix) > 1:
        for layer in layers:
            for attention in layer.attentions:
                keys[layer.index] += 2 * Prefix(model.get_submodule(attention.module), 1).keys.numel()
    counted = Counter(layer.index for layer in layers)
    return Space(width, dict(sorted(counted.items())), keys, {"serial": serial, "parallel": some, "prefix": prefix})
