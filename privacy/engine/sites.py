"""Several sites in one batch: whose rows are whose, and the trainables of each, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """The rows ``start`` to ``stop`` - 1 of a batch, which are those of ``site``."""

    site: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Run:
    """Parts of as many rows each, one behind the other. ``at``: their sites, as an index of what is stacked."""

    start: int
    stop: int
    sites: tuple[int, ...]
    at: slice | list[int]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The run's rows of ``x`` (R, ..., d) as one matrix a site, (n, rows * ..., d)."""
        return x[self.start : self.stop].reshape(len(self.sites), -1, x.shape[-1])


class Pass:
    """A batch of several sites. ``sizes``: (site, rows) in the order in which they lie; a site comes once."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        parts, at = [], 0
        for site, rows in sizes:
            parts.append(Part(site, at, at + rows))
            at += rows
        self.parts = tuple(parts)
        self.batch = at
        self.least = min(part.rows for part in parts)
        self.runs: list[Run] = []
        begin = 0
        for end in range(1, len(parts) + 1):
            if end == len(parts) or parts[end].rows != parts[begin].rows:
                sites = tuple(part.site for part in parts[begin:end])
                self.runs.append(Run(parts[begin].start, parts[end - 1].stop, sites, _index(sites)))
                begin = end


def _index(sites: tuple[int, ...]) -> slice | list[int]:
    """A slice, which copies nothing, where that will do."""
    if sites == tuple(range(sites[0], sites[0] + len(sites))):
        return slice(sites[0], sites[0] + len(sites))
    return list(sites)


class Stacks:
    """The tensors of ``parameters`` for each of ``sites`` sites: ``values`` and ``gradients``, a row a site.

    Gradients begin at -0.0, the one number to which anything can be added without changing it, its sign included.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sites: int) -> None:
        first = next(iter(parameters.values()))
        self.parameters = dict(parameters)
        self.sites = sites
        self._offsets: dict[int, int] = {}
        self.size = 0
        for parameter in parameters.values():
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise ValueError("stacked tensors must be of one precision and on one device")
            self._offsets[id(parameter)] = self.size
            self.size += parameter.numel()
        self.values = torch.empty(sites, self.size, dtype=first.dtype, device=first.device)
        self.gradients = torch.full_like(self.values, -0.0)
        self._leaves: list[dict[int, nn.Parameter]] = [{} for _ in range(sites)]
        self._leaf_gradients: dict[tuple[int, int], torch.Tensor] = {}

    def holds(self, parameter: nn.Parameter | None) -> bool:
        return parameter is not None and id(parameter) in self._offsets

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The values of one parameter, (sites, *shape)."""
        return self._part(self.values, parameter)

    def gradients_of(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._part(self.gradients, parameter)

    def _part(self, matrix: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        at = self._offsets[id(parameter)]
        strides = tuple(math.prod(parameter.shape[axis + 1 :]) for axis in range(parameter.dim()))
        return matrix.as_strided((self.sites, *parameter.shape), (self.size, *strides), matrix.storage_offset() + at)

    def leaf(self, site: int, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter of one site, which lies in :attr:`values`."""
        known = self._leaves[site]
        if id(parameter) not in known:
            known[id(parameter)] = nn.Parameter(self.of(parameter)[site], requires_grad=parameter.requires_grad)
        return known[id(parameter)]

    def gradient(self, site: int, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of one site's parameter lies."""
        key = (site, id(parameter))
        if key not in self._leaf_gradients:
            self._leaf_gradients[key] = self.gradients_of(parameter)[site]
        return self._leaf_gradients[key]

    def leaves(self, site: int) -> dict[str, nn.Parameter]:
        """The parameters of one site by name."""
        return {name: self.leaf(site, parameter) for name, parameter in self.parameters.items()}
