"""One forward and one backward pass for the batches of several sites, each through trainables of its own.

The base model is frozen and shared, so its layers take all rows at once. A layer that holds trainables is taken over
(:mod:`.plan` says which): plain linear ones multiply each site's rows with that site's matrix (:mod:`.grouped`), any
other runs once a site, on its rows and with its tensors. So nothing of one site reaches another's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import UserError
from ...core.profile import section
from .clippedsum import Block, ClippedSum, Dense
from .derived import Waiting
from .exact import MEMORY, ExactGradients
from .grouped import Into, IntoRows, IntoSums, SitesLinear, Turned, in_parts
from .leaf import tensors
from .plan import Unit, plan, refusal
from .rows import Rows, Slot
from .sites import Part, Pass, Stacks

_PLAIN = (nn.Linear, Conv1D)
#: Units whose rows of all sites are multiplied at once.
_GROUPED = ("linear", "conv1d")
#: Runs a unit for one part: with the site's tensors, on the site's rows of what the layer was given.
OfPart = Callable[[Part, Sequence[Any], Mapping[str, Any]], Any]


class _Takeover:
    """A model's forward passes, replaced by those of several sites while it is entered.

    ``stacks``: all tensors that may differ between the sites. Say :meth:`expect` before each forward pass.
    """

    def __init__(self, model: nn.Module, stacks: Stacks) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._stacks = stacks
        self.units = plan(model, modules, stacks.parameters)
        self._anchor = torch.zeros((), device=stacks.values.device, requires_grad=True)
        self._shared = _shared_layers(modules, self.units)
        self._patched: list[tuple[Any, str, Any]] = []
        self._places: dict[str, list[tuple[Any, str, nn.Parameter]]] = {}
        self.passing: Pass | None = None

    def attach(self, each: Callable[[Unit, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Take over; ``each(unit, original)`` gives what runs in place of a unit's own forward pass."""
        self.passing = None
        for unit in self.units:
            name = "get_prompt" if unit.kind == "prompt" else "forward"
            self._replace(unit.module, name, self._while_passing(each(unit, getattr(unit.module, name)), unit, name))
        for layer in self._shared:
            self._replace(layer, "forward", self._apart_where_few(layer.forward))

    def detach(self) -> None:
        for module, name, before in reversed(self._patched):
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
        self._patched = []
        self.passing = None

    def _replace(self, module: nn.Module, name: str, run: Callable[..., Any]) -> None:
        self._patched.append((module, name, module.__dict__.get(name)))
        setattr(module, name, run)

    def _while_passing(self, instead: Callable[..., Any], unit: Unit, name: str) -> Callable[..., Any]:
        original = getattr(unit.module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self.passing is None else instead(*args, **kwargs)

        return run

    def _apart_where_few(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A frozen layer, by itself for each site that brings only a few rows."""

        def run(x: torch.Tensor) -> torch.Tensor:
            passing = self.passing
            if passing is None or len(x) != passing.batch:
                return original(x)
            return in_parts(original, x, passing)

        return run

    def expect(self, passing: Pass) -> None:
        self.passing = passing

    def now(self) -> Pass:
        if self.passing is None:
            raise RuntimeError("expect() has not said whose rows the forward pass has")
        return self.passing

    def linear(self, unit: Unit, into: Callable[[nn.Parameter], Into | None]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A plain linear layer's forward pass; ``into``: where a parameter's gradient goes, None where it rests."""
        layer: Any = unit.module
        stacks, turned = self._stacks, unit.kind == "conv1d"
        weight, bias = layer.weight, layer.bias
        right = stacks.of(weight) if stacks.holds(weight) else weight
        right = right if turned else right.transpose(-1, -2)
        shift = stacks.of(bias) if stacks.holds(bias) else bias
        right, shift = right.detach(), None if shift is None else shift.detach()
        for_m, for_b = into(weight), None if bias is None else into(bias)
        for_m = Turned(for_m) if turned and for_m is not None else for_m
        anchor = self._anchor if for_m is not None or for_b is not None else self._anchor.detach()

        def run(x: torch.Tensor) -> Any:
            passing = self.now()
            _require_rows(unit, x, passing)
            return SitesLinear.apply(x, anchor, right, shift, passing, for_m, for_b)

        return run

    @contextmanager
    def _as_site(self, unit: Unit, site: int) -> Iterator[None]:
        """Within, ``unit`` holds the tensors of ``site``."""
        if unit.path not in self._places:
            self._places[unit.path] = [
                (owner._parameters, key, parameter)
                for owner in unit.module.modules()
                for key, parameter in owner._parameters.items()
                if parameter is not None and self._stacks.holds(parameter)
            ]
        places = self._places[unit.path]
        try:
            for table, key, parameter in places:
                table[key] = self._stacks.leaf(site, parameter)
            yield
        finally:
            for table, key, parameter in places:
                table[key] = parameter

    def by_site(self, unit: Unit, run: OfPart) -> Callable[..., Any]:
        """Another layer's forward pass: ``run`` for each site on its rows, the results one behind the other."""

        def of_all(*args: Any, **kwargs: Any) -> Any:
            passing = self.now()
            results = []
            for part in passing.parts:
                given = [_rows_of(unit, value, part, passing) for value in args]
                named = {name: _rows_of(unit, value, part, passing) for name, value in kwargs.items()}
                with self._as_site(unit, part.site):
                    results.append(_with_rows(run(part, given, named), part.rows))
            return _together(results)

        def prompts(batch_size: int, *args: Any, **kwargs: Any) -> Any:
            passing = self.now()
            if batch_size != passing.batch:
                raise UserError("the model makes another number of prompts than there are examples")
            results = []
            for part in passing.parts:
                with self._as_site(unit, part.site):
                    results.append(run(part, [part.rows, *args], kwargs))
            return _together(results)

        return prompts if unit.kind == "prompt" else of_all


def _shared_layers(modules: Mapping[str, nn.Module], units: Sequence[Unit]) -> list[nn.Module]:
    """The plain linear layers outside of all units."""
    inside = {id(module) for unit in units if unit.kind != "prompt" for module in unit.module.modules()}
    found = {id(m): m for m in modules.values() if type(m) in _PLAIN and id(m) not in inside}
    return list(found.values())


def _require_rows(unit: Unit, x: torch.Tensor, passing: Pass) -> None:
    if not x.dim() or len(x) != passing.batch:
        raise UserError(f"layer {unit.path} gets an input whose first dimension does not hold the examples")


def _rows_of(unit: Unit, value: Any, part: Part, passing: Pass) -> Any:
    """The rows of one site of what a layer was given; a single row is the same for all.

    Raises :class:`UserError` for a tensor of which it cannot be told whether it holds the examples.
    """
    if isinstance(value, torch.Tensor):
        if not value.dim() or len(value) == 1:
            return value  # with a batch of one row too, whose only part it is
        if value.dim() == 1 or len(value) != passing.batch:
            raise UserError(f"layer {unit.path} gets an input whose first dimension does not hold the examples")
        return value[part.start : part.stop]
    if isinstance(value, list | tuple):
        return type(value)(_rows_of(unit, each, part, passing) for each in value)
    return value


def _with_rows(value: Any, rows: int) -> Any:
    """What a layer gave once for all rows of a site, for each of them."""
    if isinstance(value, torch.Tensor):
        return value.expand(rows, *value.shape[1:]) if value.dim() and len(value) == 1 < rows else value
    if isinstance(value, list | tuple):
        return type(value)(_with_rows(each, rows) for each in value)
    return value


def _together(results: Sequence[Any]) -> Any:
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(results))
    if isinstance(first, list | tuple):
        return type(first)(_together(parts) for parts in zip(*results, strict=True))
    tensors(first)  # raises TypeError for what holds its tensors in another way
    return first


class SitesSums:
    """The gradients of several sites' losses, added to ``stacks.gradients``: training without privacy.

    ``trainables``: those of ``stacks`` that train now, by name; the others keep each site's values. Use as a context
    manager. Raises :class:`UserError` for a trainable that no layer answers for.
    """

    def __init__(self, model: nn.Module, trainables: Mapping[str, nn.Parameter], stacks: Stacks) -> None:
        self._takeover = _Takeover(model, stacks)
        self._stacks = stacks
        self._trained = {id(parameter) for parameter in trainables.values()}

    def __enter__(self) -> SitesSums:
        self._takeover.attach(self._instead)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._takeover.detach()

    def expect(self, passing: Pass) -> None:
        """Say whose rows the next forward pass has."""
        self._takeover.expect(passing)

    def add(self, losses: torch.Tensor, weights: torch.Tensor) -> None:
        """Backward through ``losses`` (R,), each times its weight: the gradients join those of its site."""
        passing = self._takeover.now()
        if losses.shape != (passing.batch,):
            raise UserError("the task gave another number of losses than of examples")
        with self._into_leaves(passing), torch.autocast(losses.device.type, enabled=False), section("backward"):
            losses.backward(weights)
        self._takeover.passing = None

    @contextmanager
    def _into_leaves(self, passing: Pass) -> Iterator[None]:
        """What layers that run once a site give by themselves goes to the same place."""
        leaves = [
            (self._stacks.leaf(part.site, parameter), self._stacks.gradient(part.site, parameter))
            for unit in self._takeover.units
            if unit.kind not in _GROUPED
            for parameter in unit.parameters
            if id(parameter) in self._trained
            for part in passing.parts
        ]
        for leaf, gradient in leaves:
            leaf.grad = gradient
        try:
            yield
        finally:
            for leaf, _ in leaves:
                leaf.grad = None

    def _instead(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        if unit.kind in _GROUPED:
            return self._takeover.linear(unit, self._into)
        for parameter in unit.parameters:
            for site in range(self._stacks.sites):
                self._stacks.leaf(site, parameter).requires_grad_(id(parameter) in self._trained)
        return self._takeover.by_site(unit, lambda part, args, kwargs: original(*args, **kwargs))

    def _into(self, parameter: nn.Parameter) -> Into | None:
        if id(parameter) not in self._trained:
            return None
        return IntoSums(self._stacks, parameter, self._takeover.now)


class SitesRows(ExactGradients):
    """The exact gradient of each example of several sites, clipped and added up by site: training with privacy.

    ``trainables``: those of ``stacks`` that train now, by name. Each site has a :class:`~.clippedsum.ClippedSum` of its
    own, with its clip and its noise. Construction refuses what :class:`~.exact.ExactGradients` refuses.

    Guarantee
    ---------
    That of :class:`~.gradients.ClippedGradients` for each site by itself: a row is written from its own example and its
    own site's tensors, and joins its site's sum alone.
    """

    verified: ClassVar[WeakKeyDictionary[nn.Module, tuple[str, ...]]] = WeakKeyDictionary()

    def __init__(
        self, model: nn.Module, trainables: Mapping[str, nn.Parameter], stacks: Stacks, memory: int = MEMORY
    ) -> None:
        super().__init__(model, trainables, clip=1.0, memory=memory)
        if self._kept:
            raise UserError("a trainable is too large to be written out for each example of several sites")
        self._stacks = stacks
        self._takeover = _Takeover(model, stacks)
        self._of_site: dict[int, tuple[Rows, Waiting]] = {}
        self._rules: dict[tuple[str, int], Callable[..., Any]] = {}
        self._plain, others = set[int](), set[int]()
        for unit in self._takeover.units:
            (self._plain if unit.kind in _GROUPED else others).update(map(id, unit.parameters))
        if self._plain & others:
            raise UserError("a trainable is shared by layers of two kinds")

    def _attach(self) -> None:
        self._batch, self._inside = None, False
        self._takeover.attach(self._replacing)

    def _detach(self) -> None:
        self._takeover.detach()
        self._forget()
        self._dense.free()
        self._of_site, self._rules = {}, {}

    def _replacing(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        if unit.kind in _GROUPED:
            return self._takeover.linear(unit, self._into)

        def run(part: Part, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            with self._as_site(part):
                key = (unit.path, part.site)
                if key not in self._rules:
                    leaves = tuple(self._stacks.leaf(part.site, parameter) for parameter in unit.parameters)
                    own = replace(unit, parameters=leaves)
                    self._rules[key] = getattr(super(SitesRows, self), f"_{unit.kind}")(own, original)
                return self._rules[key](*args, **kwargs)

        return self._takeover.by_site(unit, run)

    def _into(self, parameter: nn.Parameter) -> Into | None:
        slot: Slot | None = self._slot(parameter)
        return None if slot is None else IntoRows(slot)

    @contextmanager
    def _as_site(self, part: Part) -> Iterator[None]:
        """Within, the engine is that of one site, whose rows lie among the others'."""
        if part.site not in self._of_site:
            leaves = []
            for name, parameter in self._stacks.parameters.items():
                leaf = self._stacks.leaf(part.site, parameter)
                leaf.requires_grad_(name in self.trainables)
                if name in self.trainables:
                    self._names[id(leaf)] = name
                    leaves.append(leaf)
            rows = Rows(leaves)
            self._of_site[part.site] = rows, Waiting(rows)
        before = self._dense, self._waiting, self._batch
        (self._dense, self._waiting), self._batch = self._of_site[part.site], part.rows
        self._dense.batch = part.rows
        try:
            yield
        finally:
            self._dense, self._waiting, self._batch = before

    def begin(self, passing: Pass) -> None:
        """Say whose rows the next forward pass has."""
        super().expect(passing.batch)
        self._takeover.expect(passing)

    def add_for(
        self, losses: torch.Tensor, sums: Mapping[int, ClippedSum], units: Mapping[int, torch.Tensor | None]
    ) -> None:
        """Backward through ``losses``, one a row; each site's rows join its sum. ``units``: as for :meth:`add`."""
        passing = self._takeover.now()
        self._adding = passing, sums, units
        try:
            self.add(losses)
        finally:
            self._takeover.passing = None

    def _join(self, blocks: Sequence[Block], norms: Sequence[float], units: torch.Tensor | None) -> None:
        passing, sums, of_site = self._adding
        matrix = self._dense.matrix
        for part in passing.parts:
            rows = slice(part.start, part.stop)
            sums[part.site].add([Dense(matrix[rows])], norms[rows], of_site[part.site])

    # --- rows of layers that run once a site ------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        for part in self._takeover.now().parts:
            if part.site in self._of_site:
                self._of_site[part.site][0].lie_in(self._dense.matrix[part.start : part.stop])

    def _passing_sites(self) -> Iterator[tuple[Rows, Waiting]]:
        return (self._of_site[part.site] for part in self._takeover.now().parts if part.site in self._of_site)

    def _pass_on(self) -> None:
        for rows, waiting in self._passing_sites():
            waiting.pass_on()
            for leaf in rows.parameters:
                if leaf.grad is not None:
                    leaf.grad = None
                    raise refusal(self._names[id(leaf)], "it is used by an operation out of sight")

    def _forget(self) -> None:
        super()._forget()
        for _, waiting in self._of_site.values():
            waiting.slots.clear()

    def _unwritten(self) -> Iterator[tuple[Rows, nn.Parameter, str]]:
        """What no rows were written for: the rows in which it is missing, the parameter, its name."""
        ran = all(part.site in self._of_site for part in self._takeover.now().parts)
        for parameter in self._dense.missing():
            if id(parameter) in self._plain or not ran:
                yield self._dense, parameter, self._names[id(parameter)]
        for rows, _ in self._passing_sites():
            for leaf in rows.missing():
                name = self._names[id(leaf)]
                if id(self.trainables[name]) not in self._plain:
                    yield rows, leaf, name

    def _missing(self) -> set[int]:
        return {id(self.trainables[name]) for _, _, name in self._unwritten()}

    def _clear_missing(self) -> None:
        for rows, parameter, _ in self._unwritten():
            rows.part(parameter).zero_()
