"""Runs a layer as it is and watches where a record meets a trainable: there, and only there, a rule takes over.

What the layer computes from its trainables alone (DoRA's magnitudes, OFT's rotation, a LoHa product) it computes once,
as ever; such a result meets the records like a trainable would, and passes its rows on (:mod:`.derived`). What it
computes from the records alone is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .clippedsum import wide
from .derived import DerivedSlot, ForeignGraphError, Waiting, trainables_behind
from .rows import ParameterSlot, Rows, Slot, Turned, turned
from .rules import ConvolutionRows, EinsumRows, EmbeddingRows, LayerNormRows, LinearRows, ScaleRows, ShiftRows

#: Operations that take no more than a kind or a place from their second operand.
_OF_THE_FIRST = ("to", "type_as")


class UnknownMeetingError(Exception):
    """A record meets a trainable in an operation without a rule."""


class TooLargeError(Exception):
    """The rows of a derived tensor would take more memory than is allowed; ``most_rows``: how many would not."""

    def __init__(self, most_rows: int) -> None:
        super().__init__()
        self.most_rows = most_rows


class Meeting(TorchFunctionMode):
    """A context in which ``records`` (tensors with one row an example first) meet the parameters of ``rows``.

    ``memory``: bytes that the rows of one derived tensor may take.
    """

    def __init__(self, rows: Rows, waiting: Waiting, batch: int, records: Sequence[torch.Tensor], memory: int) -> None:
        super().__init__()
        self._rows, self._waiting, self.batch, self._memory = rows, waiting, batch, memory
        self._known = rows.known
        # By identity; holding them keeps the identities theirs.
        self._data = {id(record): record for record in records}
        # Made from trainables where no gradient is taken.
        self._hidden: dict[int, torch.Tensor] = {}
        self._entries: set[object] = {record.grad_fn for record in records if record.grad_fn is not None}
        self._derived: dict[int, DerivedSlot] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args))
        if kwargs:
            tensors.extend(_tensors(kwargs.values()))
        if not tensors:
            return func(*args, **kwargs)
        data = self._data
        among = [tensor for tensor in tensors if id(tensor) in data]
        if not torch.is_grad_enabled():
            return self._in_the_dark(func, args, kwargs, tensors, bool(among))
        if not among or (func.__name__ in _OF_THE_FIRST and id(tensors[0]) not in data):
            # What belongs to no example is kept by itself: checkpointing would make it again for each use.
            with keeping():
                return func(*args, **kwargs)
        if any(t.requires_grad and id(t) not in data for t in tensors):
            result = self._met(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            if _in_place(func):
                data[id(args[0])] = args[0]
        for tensor in _tensors((result,)):
            data[id(tensor)] = tensor
        return result

    def _in_the_dark(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Any], data: bool
    ) -> Any:
        """An operation without gradient: constants, or the inside of somebody's own autograd function."""
        hidden = any(self.trains(tensor) or id(tensor) in self._hidden for tensor in tensors)
        if hidden and data:
            raise UnknownMeetingError("an autograd function of its own")
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            if data:
                self._data[id(tensor)] = tensor
            elif hidden:
                self._hidden[id(tensor)] = tensor
        return result

    def _met(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        rule = _RULES.get(func.__name__.strip("_")) if not _in_place(func) else None
        if rule is None:
            raise UnknownMeetingError(func.__name__)
        try:
            return rule(self, *args, **kwargs)
        except TypeError:
            # Called in a way that the rule does not take.
            raise UnknownMeetingError(func.__name__) from None

    def is_data(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._data

    def trains(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.requires_grad and id(value) not in self._data

    def record(self, value: Any) -> torch.Tensor:
        """``value`` when it is a record with the batch first and alone there."""
        if not self.is_data(value) or value.dim() < 2 or len(value) != self.batch:
            raise UnknownMeetingError("the batch is not the first dimension")
        return value

    def slot(self, value: torch.Tensor) -> tuple[torch.Tensor, Slot]:
        """What stands for a trainable in a rule, and where its rows go."""
        parameter = self._known.get(id(value))
        if parameter is not None:
            return parameter, ParameterSlot(self._rows, parameter)
        if value._base is not None and id(value._base) in self._known:
            parameter = self._known[id(value._base)]
            if parameter.is_contiguous() and 0 not in value.stride() and value.dtype == parameter.dtype:
                return value.detach().requires_grad_(), ParameterSlot(self._rows, parameter, value)
        derived = self._derived.get(id(value))
        if derived is None:
            try:
                behind = trainables_behind(value, self._known, self._entries) if value.grad_fn is not None else [value]
            except ForeignGraphError:
                raise UnknownMeetingError("something else than trainables meets the records") from None
            of_one = value.numel() * wide(value.dtype).itemsize
            if of_one * self.batch > self._memory:
                raise TooLargeError(max(1, self._memory // of_one))
            derived = self._derived[id(value)] = DerivedSlot(self._waiting, value, behind)  # type: ignore[arg-type]
        derived.used()
        return derived.leaf, derived

    def optional_slot(self, value: Any) -> tuple[Any, Slot | None]:
        return self.slot(value) if self.trains(value) else (value, None)


def keeping() -> saved_tensors_hooks:
    """A context in which what a backward pass needs is kept as it is: checkpointing would make it again."""
    return saved_tensors_hooks(_without_graph, _as_it_is)


def _without_graph(tensor: torch.Tensor) -> torch.Tensor:
    # What an operation gives is among what it keeps, and its graph holds that operation: both would stay for ever.
    return tensor.detach()


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


# --- the operations ------------------------------------------------------------------------------------------------


def _linear(meeting: Meeting, input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    x = meeting.record(input)
    if meeting.is_data(weight) or meeting.is_data(bias):
        raise UnknownMeetingError("linear")
    w, for_w = meeting.optional_slot(weight)
    b, for_b = meeting.optional_slot(bias)
    return LinearRows.apply(x, w, b, for_w, for_b)


def _matmul(meeting: Meeting, input: Any, other: Any) -> torch.Tensor:
    if meeting.trains(other) and other.dim() == 2:
        w, slot = meeting.slot(other)
        return LinearRows.apply(meeting.record(input), turned(w), None, Turned(slot), None)
    if meeting.trains(input) and input.dim() == 2 and meeting.record(other).dim() == 3:
        w, slot = meeting.slot(input)
        return LinearRows.apply(meeting.record(other).transpose(1, 2), w, None, slot, None).transpose(1, 2)
    raise UnknownMeetingError("matmul")


def _pair(meeting: Meeting, a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The record and the trainable of two operands, once it is sure that the trainable is the same for each row."""
    x, w = (b, a) if meeting.trains(a) else (a, b)
    x = meeting.record(x)
    if w.dim() > x.dim() or (w.dim() == x.dim() and len(w) != 1):
        raise UnknownMeetingError("the trainable has a row for each example")
    return x, w


def _mul(meeting: Meeting, input: Any, other: Any) -> torch.Tensor:
    x, w = _pair(meeting, input, other)
    w, slot = meeting.slot(w)
    return ScaleRows.apply(x, w, slot)


def _add(meeting: Meeting, input: Any, other: Any, *, alpha: float = 1) -> torch.Tensor:
    x, w = _pair(meeting, input, other)
    if alpha != 1:
        raise UnknownMeetingError("add")
    w, slot = meeting.slot(w)
    return ShiftRows.apply(x, w, slot)


def _sub(meeting: Meeting, input: Any, other: Any, *, alpha: float = 1) -> torch.Tensor:
    x, w = _pair(meeting, input, other)
    if alpha != 1:
        raise UnknownMeetingError("sub")
    if w is other:
        with keeping():
            w, slot = meeting.slot(-w)
        return ShiftRows.apply(x, w, slot)
    w, slot = meeting.slot(w)
    return ShiftRows.apply(-x, w, slot)


def _div(meeting: Meeting, input: Any, other: Any) -> torch.Tensor:
    x, w = _pair(meeting, input, other)
    if w is not other:
        raise UnknownMeetingError("div")
    with keeping():
        w, slot = meeting.slot(1 / w)
    return ScaleRows.apply(x, w, slot)


def _einsum(meeting: Meeting, equation: str, *operands: Any) -> torch.Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or "->" not in equation:
        raise UnknownMeetingError("einsum")
    labels = _labels(equation, [operand.dim() for operand in operands])
    if meeting.trains(operands[0]):
        operands, labels = (operands[1], operands[0]), (labels[1], labels[0], labels[2])
    x = meeting.record(operands[0])
    of_x, _, of_y = labels
    x_labels, w_labels, y_labels = map(set, labels)
    whole = all(len(set(each)) == len(each) for each in labels)
    apart = of_x[0] not in w_labels and of_y[:1] == of_x[0]
    if not (whole and apart and x_labels <= w_labels | y_labels and w_labels <= x_labels | y_labels):
        raise UnknownMeetingError("einsum")
    w, slot = meeting.slot(operands[1])
    return EinsumRows.apply(x, w, labels, slot)


def _labels(equation: str, dims: Sequence[int]) -> tuple[str, str, str]:
    """The labels of both operands and of the result, with an ellipsis spelt out."""
    left, _, of_y = equation.replace(" ", "").partition("->")
    of_operands = left.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    longest = max((n - len(o) + 3 for o, n in zip(of_operands, dims, strict=True) if "..." in o), default=0)
    spelt = []
    for operand, n in zip([*of_operands, of_y], [*dims, longest + len(of_y) - 3], strict=True):
        extra = n - len(operand) + 3
        spelt.append(operand.replace("...", "".join(free[longest - extra : longest])) if "..." in operand else operand)
    return spelt[0], spelt[1], spelt[2]


def _layer_norm(
    meeting: Meeting, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    x = meeting.record(input)
    w, for_w = meeting.optional_slot(weight)
    b, for_b = meeting.optional_slot(bias)
    return LayerNormRows.apply(x, tuple(normalized_shape), w, b, eps, for_w, for_b)


def _rms_norm(meeting: Meeting, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
    w, slot = meeting.slot(weight)
    plain = nn.functional.rms_norm(meeting.record(input), normalized_shape, None, eps)
    return ScaleRows.apply(plain, w, slot)


def _embedding(
    meeting: Meeting,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    if (
        max_norm is not None
        or scale_grad_by_freq
        or sparse
        or not meeting.is_data(input)
        or len(input) != meeting.batch
    ):
        raise UnknownMeetingError("embedding")
    w, slot = meeting.slot(weight)
    return EmbeddingRows.apply(input, w, None if padding_idx is None else padding_idx % len(weight), slot)


def _conv2d(
    meeting: Meeting,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    x = meeting.record(input)
    if isinstance(padding, str) or x.dim() != 4:
        raise UnknownMeetingError("conv2d")
    w, for_w = meeting.optional_slot(weight)
    b, for_b = meeting.optional_slot(bias)
    how = [list(value) if isinstance(value, list | tuple) else [value, value] for value in (stride, padding, dilation)]
    return ConvolutionRows.apply(x, w, b, *how, groups, for_w, for_b)


_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "mul": _mul,
    "rmul": _mul,
    "multiply": _mul,
    "add": _add,
    "radd": _add,
    "sub": _sub,
    "rsub": lambda meeting, a, b: _sub(meeting, b, a),
    "div": _div,
    "einsum": _einsum,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "embedding": _embedding,
    "conv2d": _conv2d,
}
