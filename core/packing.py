"""Many small tensors as one flat array per dtype, and back, strictly.

Every array of a message costs Flower two objects and as many requests, so an adapter travels as one flat array and a
table of contents. Decoding trusts nothing: the table must list exactly the expected tensors, in order, and the flat
arrays must hold exactly their numbers.

Wire format 1: ``table`` is JSON with the keys of :class:`Table`; ``arrays`` maps ``float32``, ``float64``, ``float16``
or ``bfloat16`` (as int16 bits, which NumPy's .npy format can carry) to the concatenated, C-ordered values.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from .adapter import AdapterSpec, AdapterState, explain_shape
from .errors import UserError

VERSION = 1
#: What :func:`agree` came to last: both ends ask anew with every message.
_AGREED: OrderedDict[tuple[object, ...], AdapterSpec] = OrderedDict()
_KEEP = 64
_NARROW = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Table:
    """The table of contents of a packed adapter.

    ``spec``: digest of the sender's :class:`AdapterSpec`; ``state``: digest of the full state that results;
    ``rest``: digest of the state that fills the tensors that are not listed (empty: all are listed);
    ``freeze`` and ``local``: positions of the tensors of the spec with these policies.
    """

    version: int
    spec: str
    state: str
    rest: str
    wire: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    freeze: tuple[int, ...] = ()
    local: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, sender: str) -> Table:
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            # ValueError: also for an integer too long to convert.
            raise UserError(f"{sender}: the adapter's table of contents is not JSON") from None
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is not int or version != VERSION:
            shown = version if isinstance(version, int | float | str) else "unknown"
            raise UserError(
                f"{sender}: wire format {shown}, this end speaks {VERSION}; install the same fedgraft everywhere"
            )
        expected = {f.name for f in fields(cls)}
        if set(values) != expected:
            odd = sorted(set(values) ^ expected)[0]
            raise UserError(f"{sender}: the adapter's table of contents has an unknown or missing entry `{odd}`")
        try:
            tensors = tuple((_text(name), _naturals(shape)) for name, shape in _list(values["tensors"]))
            freeze, local = _naturals(values["freeze"]), _naturals(values["local"])
            texts = {key: _text(values[key]) for key in ("spec", "state", "rest", "wire")}
            if texts["wire"] not in ("fp32", "fp16", "bf16"):
                raise ValueError("not a wire dtype")
        except (TypeError, ValueError):
            raise UserError(f"{sender}: the adapter's table of contents is malformed") from None
        return cls(version=VERSION, tensors=tensors, freeze=freeze, local=local, **texts)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _naturals(value: object) -> tuple[int, ...]:
    numbers = _list(value)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not natural numbers")
    return tuple(numbers)


def _to_bf16(array: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (int16), round to nearest even, as hardware does."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.int16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _carrier(dtype: str, wire: str) -> str:
    """The dtype in which a tensor of ``dtype`` travels: only float32 is narrowed."""
    return _NARROW.get(wire, dtype) if dtype == "float32" else dtype


def pack(
    state: AdapterState, *, wire: str = "fp32", whole: str | None = None, rest: str = ""
) -> tuple[dict[str, np.ndarray], Table]:
    """Flatten ``state`` into one array per dtype and its table.

    ``whole``: digest of the full state when ``state`` is a part of it; ``rest``: digest of the state that the receiver
    already holds and takes the other tensors from. Raises :class:`UserError` that names a non-finite tensor, also
    one that overflows the narrow ``wire`` dtype.
    """
    state.require_finite()
    parts: dict[str, list[np.ndarray]] = {}
    for name, array in state.items():
        carrier = _carrier(array.dtype.name, wire)
        flat = array.reshape(-1)
        if carrier == "float16":
            with np.errstate(over="ignore"):
                flat = flat.astype(np.float16)
            if not np.isfinite(flat).all():
                raise UserError(f"tensor {name} overflows fp16 on the wire; set server.wire_dtype to bf16 or fp32")
        elif carrier == "bfloat16":
            flat = _to_bf16(flat)
            if not np.isfinite(_from_bf16(flat)).all():
                raise UserError(f"tensor {name} overflows bf16 on the wire; set server.wire_dtype to fp32")
        parts.setdefault(carrier, []).append(flat)
    spec = state.spec
    table = Table(
        version=VERSION,
        spec=spec.digest,
        state=whole or state.digest,
        rest=rest,
        wire=wire,
        tensors=tuple((name, array.shape) for name, array in state.items()),
        freeze=tuple(i for i, t in enumerate(spec.tensors) if t.policy == "freeze"),
        local=tuple(i for i, t in enumerate(spec.tensors) if t.policy == "local"),
    )
    return {carrier: np.concatenate(chunks) for carrier, chunks in parts.items()}, table


def agree(table: Table, spec: AdapterSpec, sender: str) -> AdapterSpec:
    """``spec`` with the policies of ``table``; raises :class:`UserError` unless both ends mean the same adapter."""
    key = (spec.digest, table.spec, table.freeze, table.local)
    if key not in _AGREED:
        if max((*table.freeze, *table.local), default=-1) >= len(spec.tensors):
            raise UserError(f"{sender}: the adapter has more tensors than this end's {spec.method} adapter")
        frozen = {spec.tensors[i].name for i in table.freeze}
        local = {spec.tensors[i].name for i in table.local}
        agreed = spec.with_policy("share", lambda t: True)
        agreed = agreed.with_policy("freeze", lambda t: t.name in frozen).with_policy(
            "local", lambda t: t.name in local
        )
        if agreed.digest != table.spec:
            _explain_difference(table, spec, sender)
        _AGREED[key] = agreed
        while len(_AGREED) > _KEEP:
            _AGREED.popitem(last=False)
    return _AGREED[key]


def _explain_difference(table: Table, spec: AdapterSpec, sender: str) -> None:
    for name, shape in table.tensors:
        if name not in spec.by_name:
            raise UserError(f"{sender}: unknown tensor {name}; this end trains {spec.method}")
        if spec.by_name[name].shape != shape:
            raise UserError(f"{sender}: {explain_shape(name, shape, spec.by_name[name].shape)}")
    raise UserError(
        f"{sender}: the adapter differs in its tensors, method, rank, alpha or scaling (here {spec.method}, rank "
        f"{spec.rank}, alpha {spec.alpha}); use one configuration everywhere"
    )


def unpack(
    arrays: Mapping[str, np.ndarray],
    table: Table,
    spec: AdapterSpec,
    *,
    sender: str,
    names: Iterable[str] | None = None,
    held: AdapterState | None = None,
) -> AdapterState:
    """The inverse of :func:`pack`.

    ``spec``: what this end expects; ``names``: the tensors that must be listed, no more and no fewer (default: all of
    the spec, or with ``table.rest`` whatever is listed, the others coming from ``held``).
    Raises :class:`UserError` that names ``sender`` and the first unknown, missing, duplicated, mis-shaped or
    non-finite tensor.
    """
    agreed = agree(table, spec, sender)
    listed = [name for name, _ in table.tensors]
    seen: set[str] = set()
    for name, shape in table.tensors:
        if name in seen:
            raise UserError(f"{sender}: tensor {name} is listed twice")
        seen.add(name)
        if name not in agreed.by_name:
            raise UserError(f"{sender}: unknown tensor {name}")
        if shape != agreed.by_name[name].shape:
            raise UserError(f"{sender}: {explain_shape(name, shape, agreed.by_name[name].shape)}")
    if names is not None:
        wanted = list(names)
    elif table.rest:
        wanted = [name for name in agreed.names if name in seen]
    else:
        wanted = list(agreed.names)
    for name in wanted:
        if name not in seen:
            raise UserError(f"{sender}: tensor {name} is missing")
    for name in listed:
        if name not in wanted:
            raise UserError(f"{sender}: tensor {name} is not among the declared tensors")
    if listed != wanted:
        raise UserError(f"{sender}: the tensors are not in the order of the adapter's description")
    tensors = _cut(arrays, table, agreed, sender)
    state = AdapterState(agreed, tensors, names=wanted)
    try:
        state.require_finite()
    except UserError as error:
        raise UserError(f"{sender}: {error}") from None
    if table.rest:
        if held is None:
            raise UserError(f"{sender}: the state {table.rest[:12]} that fills the other tensors is not held here")
        try:
            state = state.filled_from(held)
        except UserError as error:
            raise UserError(f"{sender}: the state that fills the other tensors does not fit: {error}") from None
    # A narrow wire rounds the tensors, so only an exact one can be checked.
    if table.wire == "fp32" and state.digest != table.state:
        raise UserError(f"{sender}: the adapter's tensors do not match the digest that was sent with them")
    return state


def _cut(arrays: Mapping[str, np.ndarray], table: Table, spec: AdapterSpec, sender: str) -> dict[str, np.ndarray]:
    carriers = [_carrier(spec.by_name[name].dtype, table.wire) for name, _ in table.tensors]
    for key in arrays:
        if key not in carriers:
            raise UserError(f"{sender}: an array of {key} that the table does not list")
    native: dict[str, np.ndarray] = {}
    for key in dict.fromkeys(carriers):
        numbers = sum(spec.by_name[n].size for (n, _), c in zip(table.tensors, carriers, strict=True) if c == key)
        stored = "int16" if key == "bfloat16" else key
        got = arrays.get(key)
        if got is None or got.dtype.name != stored or got.shape != (numbers,):
            shown = "nothing" if got is None else f"{got.dtype.name}{list(got.shape)}"
            raise UserError(f"{sender}: the packed {key} array should be {stored}[{numbers}], got {shown}")
        native[key] = np.ascontiguousarray(got, dtype=stored)
    at = dict.fromkeys(carriers, 0)
    tensors: dict[str, np.ndarray] = {}
    for (name, shape), carrier in zip(table.tensors, carriers, strict=True):
        size = spec.by_name[name].size
        flat = native[carrier][at[carrier] : at[carrier] + size]
        at[carrier] += size
        if carrier == "bfloat16":
            flat = _from_bf16(flat)
        elif carrier == "float16":
            flat = flat.astype(np.float32)
        tensors[name] = flat.reshape(shape)
    return tensors
