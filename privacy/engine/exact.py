"""fedgraft's own engine: each example's gradient, exact for every trainable, in the one backward pass of the batch.

Layers that hold trainables run as ever, but where a record meets a trainable a rule notes that example's part of the
gradient in a flat buffer, and gives the trainable itself none: :mod:`.plan`, :mod:`.meeting`, :mod:`.rules`,
:mod:`.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...core.errors import UserError, is_out_of_memory
from .clippedsum import Block, Dense
from .derived import DerivedSlot, ForeignGraphError, Waiting, trainables_behind
from .forms import form_of
from .ghost import LARGE, KeptMatrix
from .gradients import WHOLE_TOLERANCE, ClippedGradients, row_is_off
from .leaf import batch_dimensions, joined, one_by_one, tensors
from .meeting import Meeting, TooLargeError, UnknownMeetingError, keeping
from .plan import Unit, plan, refusal
from .rows import ParameterSlot, Rows, Slot, Turned, turned
from .rules import EmbeddingRows, LayerNormRows, LinearRows, SpreadRows

#: Bytes that the rows of one batch may take.
MEMORY = 4 * 2**30

# Layers that ran once, and which operation without a rule each met there, if any.
_ways: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


class ExactGradients(ClippedGradients):
    """The engine ``exact``. ``memory``: bytes that one batch's rows may take; ``most_rows`` is what that allows."""

    #: Models whose rows were once held against a backward pass of one example's own, with what trained then.
    verified: ClassVar[WeakKeyDictionary[nn.Module, tuple[str, ...]]] = WeakKeyDictionary()

    def __init__(
        self, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float, memory: int = MEMORY
    ) -> None:
        super().__init__(model, trainables, clip)
        self._units = plan(model, self._modules, self.trainables)
        self._names = {id(parameter): name for name, parameter in self.trainables.items()}
        large = _large(self.trainables.values(), self._units)
        self._kept = {id(p): KeptMatrix(p) for p in self.trainables.values() if id(p) in large}
        self._dense = Rows([p for p in self.trainables.values() if id(p) not in large])
        self._waiting = Waiting(self._dense)
        width = 8 if any(p.dtype == torch.float64 for p in self.trainables.values()) else 4
        self.most_rows = max(1, memory // (width * self._dense.size)) if self._dense.size else 2**31
        self._memory = memory
        self._batch: int | None = None
        self._inside = False
        #: Units that no rule fits, with the operation that has none: their examples pass one by one.
        self.one_by_one: dict[str, str] = {}
        self._dimensions: dict[str, list[int]] = {}
        self._patched: list[tuple[Any, str, Any]] = []
        self._verified = self.verified.get(model) == tuple(self.trainables)

    # --- taking over ------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._batch, self._inside = None, False
        for unit in self._units:
            name = "get_prompt" if unit.kind == "prompt" else "forward"
            original = getattr(unit.module, name)
            self._patched.append((unit.module, name, unit.module.__dict__.get(name)))
            setattr(unit.module, name, self._instead(unit, original))

    def _detach(self) -> None:
        for module, name, before in reversed(self._patched):
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
        self._patched = []
        self._forget()
        self._dense.free()

    def _forget(self) -> None:
        self._waiting.slots.clear()
        for kept in self._kept.values():
            kept.clear()

    def expect(self, rows: int) -> None:
        if rows > self.most_rows:
            raise UserError(
                f"the gradients of so many examples take more than {self._memory / 2**30:g} GiB; "
                f"set train.micro_batch to {self.most_rows} or less"
            )
        super().expect(rows)
        self._batch = rows

    def _instead(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        """What runs in place of a unit's forward pass."""
        rule: Callable[..., Any] = getattr(self, f"_{unit.kind}")(unit, original)

        def run(*args: Any, **kwargs: Any) -> Any:
            # What runs unannounced gives plain gradients, and :meth:`add` refuses those.
            if self._inside or self._batch is None or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return rule(*args, **kwargs)

        return run

    def _slot(self, parameter: nn.Parameter | None) -> Slot | None:
        if parameter is None or id(parameter) not in self._names:
            return None
        kept = self._kept.get(id(parameter))
        return ParameterSlot(self._dense, parameter) if kept is None else kept

    def _require_rows(self, unit: Unit, x: torch.Tensor) -> None:
        if not x.dim() or len(x) != self._batch:
            raise UserError(
                f"layer {unit.path} gets an input whose first dimension does not hold the examples: "
                f"tensor {self._names[id(unit.parameters[0])]} cannot be trained with privacy here"
            )

    # --- the kinds of units -----------------------------------------------------------------------------------------

    def _linear(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        layer: Any = unit.module
        for_w, for_b = self._slot(layer.weight), self._slot(layer.bias)

        def run(x: torch.Tensor) -> Any:
            self._require_rows(unit, x)
            return LinearRows.apply(x, layer.weight, layer.bias, for_w, for_b)

        return run

    def _conv1d(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        layer: Any = unit.module
        for_w, for_b = self._slot(layer.weight), self._slot(layer.bias)

        def run(x: torch.Tensor) -> Any:
            self._require_rows(unit, x)
            return LinearRows.apply(
                x, turned(layer.weight), layer.bias, Turned(for_w) if for_w is not None else None, for_b
            )

        return run

    def _norm(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        layer: Any = unit.module
        for_w, for_b = self._slot(layer.weight), self._slot(layer.bias)

        def run(x: torch.Tensor) -> Any:
            self._require_rows(unit, x)
            return LayerNormRows.apply(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps, for_w, for_b)

        return run

    def _embedding(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        layer: Any = unit.module
        slot = self._slot(layer.weight)

        def run(at: torch.Tensor) -> Any:
            if at.dim() > 1 and len(at) == 1 and self._batch is not None:
                # Positions are looked up once for all examples, which add the result each to its own.
                at = at.expand(self._batch, *at.shape[1:])
            self._require_rows(unit, at)
            return EmbeddingRows.apply(at, layer.weight, layer.padding_idx, slot)

        return run

    def _meeting(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        forward = form_of(unit.module) or original

        def meet(records: Sequence[torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            try:
                with Meeting(self._dense, self._waiting, self._batch or 0, records, self._memory):
                    return forward(*args, **kwargs)
            except TooLargeError as error:
                raise UserError(
                    f"layer {unit.path}: the gradients of so many examples take more than {self._memory / 2**30:g} "
                    f"GiB; set train.micro_batch to {error.most_rows} or less"
                ) from None

        def run(*args: Any, **kwargs: Any) -> Any:
            records = []
            for index, tensor in enumerate(_given(args, kwargs)):
                if index and tensor.dim() and len(tensor) == 1:
                    continue  # the same for every example
                self._require_rows(unit, tensor)
                records.append(tensor)
            self._inside = True
            try:
                if unit.module not in _ways:
                    # A rehearsal, of which nothing stays: what breaks off within a checkpoint cannot be run again.
                    devices = [records[0].device] if records[0].device.type == "cuda" else []
                    with torch.random.fork_rng(devices), keeping():
                        _ways[unit.module] = _reason(lambda: meet(records, args, kwargs))
                self.one_by_one.update({unit.path: why} if (why := _ways[unit.module]) else {})
                if unit.path not in self.one_by_one:
                    try:
                        return meet(records, args, kwargs)
                    except UnknownMeetingError as error:
                        self.one_by_one[unit.path] = str(error)
                return self._one_by_one(unit, original, args, kwargs)
            finally:
                self._inside = False

        return run

    def _one_by_one(
        self, unit: Unit, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        name, batch = self._names[id(unit.parameters[0])], self._batch or 0
        known = self._dimensions.get(unit.path)
        before = _generator(args, kwargs)
        try:
            results = one_by_one(unit.module, original, self._dense, batch, args, kwargs)
            if known is not None:
                return joined(results, known)
            drawn = not torch.equal(before, _generator(args, kwargs))
            with torch.no_grad():
                whole = original(*args, **kwargs)
            dimensions = batch_dimensions(results[0], whole)
            result = joined(results, dimensions)
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise refusal(name, f"its layer takes no single example: {type(error).__name__}") from None
        for alone, every in zip(tensors(result), tensors(whole), strict=True):
            # Where dropout was drawn, two passes are never equal.
            if not drawn and not float((alone.detach() - every).norm()) <= WHOLE_TOLERANCE * float(every.norm()):
                raise refusal(name, "its layer mixes the examples of a batch")
        if batch > 1:
            self._dimensions[unit.path] = dimensions
        return result

    def _prefix(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(at: torch.Tensor) -> Any:
            self._require_rows(unit, at)
            return self._spread(unit, lambda: original(at[:1]))

        return run

    def _prompt(self, unit: Unit, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(batch_size: int, *args: Any, **kwargs: Any) -> Any:
            if batch_size != self._batch:
                raise UserError("the model makes another number of prompts than there are examples")
            return self._spread(unit, lambda: original(1, *args, **kwargs))

        return run

    def _spread(self, unit: Unit, make: Callable[[], torch.Tensor]) -> Any:
        """What ``make`` gives, once for each example."""
        with keeping():
            made = make()
        try:
            behind = trainables_behind(made, {id(p): p for p in unit.parameters}, set())
        except ForeignGraphError:
            raise refusal(self._names[id(unit.parameters[0])], "its virtual tokens hang on something else") from None
        slot = DerivedSlot(self._waiting, made, behind)
        slot.used()
        return SpreadRows.apply(slot.leaf, self._batch, slot)

    # --- a batch ----------------------------------------------------------------------------------------------------

    def add(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> None:
        try:
            super().add(losses, units)
        finally:
            self._batch = None
            self._forget()

    def _rows(self, losses: torch.Tensor, *, keep_graph: bool) -> Sequence[Block]:
        if self._batch is None:
            raise RuntimeError("expect() has not said how many rows the forward pass has")
        missing = self._backward(losses.sum(), keep_graph=keep_graph)
        if missing:
            raise UserError(
                f"tensor {missing[0]} took no part in this batch, so its gradient cannot be told from none; freeze it "
                "to train with privacy"
            )
        return self._blocks()

    def _blocks(self) -> list[Block]:
        dense: list[Block] = [Dense(self._dense.matrix)] if self._dense.size else []
        return [*dense, *self._kept.values()]

    def _backward(self, loss: torch.Tensor, *, keep_graph: bool) -> list[str]:
        """Fill the rows from ``loss``; gives the names of the trainables that none was written for."""
        self._forget()
        self._begin()
        for parameter in self.trainables.values():
            parameter.grad = None
        if loss.requires_grad:
            loss.backward(retain_graph=keep_graph)
            self._pass_on()
        plain = [name for name, parameter in self.trainables.items() if parameter.grad is not None]
        for name in plain:
            self.trainables[name].grad = None
        if plain:
            raise refusal(plain[0], "it is used outside of the layer that owns it, or by an operation out of sight")
        missing = self._missing() | {id_ for id_, kept in self._kept.items() if not kept.written}
        return [name for name, parameter in self.trainables.items() if id(parameter) in missing]

    def _begin(self) -> None:
        """Make room for the rows of the batch."""
        self._dense.begin(self._batch or 0)

    def _pass_on(self) -> None:
        """Send the rows that wait to the trainables' own."""
        self._waiting.pass_on()

    def _missing(self) -> set[int]:
        """Identities of the parameters that no rows were written for."""
        return {id(parameter) for parameter in self._dense.missing()}

    def _clear_missing(self) -> None:
        """What was not written holds what an earlier batch left."""
        for parameter in self._dense.missing():
            self._dense.part(parameter).zero_()

    def _verify(self, losses: torch.Tensor, row: int, norm: float) -> None:
        """The gradient of one loss must lie in its own row, whole, and leave the others at zero.

        Rows that were mixed up (tokens routed between experts, something normalised over the batch) have the right
        shape, and only this tells.
        """
        alone = [float(index == row) for index in range(len(losses))]
        want = torch.cat([block.total(alone) for block in self._blocks()])
        self._backward(losses[row], keep_graph=False)
        self._clear_missing()
        got = torch.cat([block.total(alone) for block in self._blocks()])
        for parameter, ours, theirs in _by_parameter(self._layout(), got, want):
            if row_is_off(ours, theirs, norm):
                raise refusal(self._names[id(parameter)], "its row is not what its example alone gives")
        for block in self._blocks():
            squares = block.squares(None, 0)
            squares[row] = 0
            if not float(squares.sum().sqrt()) <= WHOLE_TOLERANCE * norm:
                raise refusal(self._stray(row), "one example's loss moves another's row: the model mixes its examples")
        self.verified[self._model] = tuple(self.trainables)

    def _stray(self, row: int) -> str:
        """The name of the tensor in whose rows most of a foreign loss was found."""
        worst, most = next(iter(self.trainables)), -1.0
        for parameter in self._dense.parameters:
            part = self._dense.part(parameter).clone()
            part[row] = 0
            if float(part.norm()) > most:
                worst, most = self._names[id(parameter)], float(part.norm())
        return worst

    def _layout(self) -> list[nn.Parameter]:
        return [*self._dense.parameters, *(kept.parameter for kept in self._kept.values())]


def _large(parameters: Any, units: Sequence[Unit]) -> set[int]:
    """Which trainables are kept as factors: large matrices of layers that have a rule for it."""
    large = {id(p) for p in parameters if p.numel() > LARGE and p.dim() == 2}
    for unit in units if large else ():
        if unit.kind not in ("linear", "conv1d", "embedding"):
            large -= {id(p) for p in unit.parameters}
    return large


def _by_parameter(layout: Sequence[nn.Parameter], *vectors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    at = 0
    for parameter in layout:
        size = parameter.numel()
        yield (parameter, *(vector[at : at + size] for vector in vectors))
        at += size


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a layer was given."""
    flat = [part for value in (*args, *kwargs.values()) for part in (value if isinstance(value, tuple) else [value])]
    return [value for value in flat if isinstance(value, torch.Tensor)]


def _generator(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The state of the random generator of the device that a layer runs on."""
    device = _given(args, kwargs)[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _reason(rehearsal: Callable[[], Any]) -> str | None:
    """The operation without a rule that a layer meets; None when there is none."""
    try:
        rehearsal()
    except UnknownMeetingError as error:
        return str(error)
    return None
