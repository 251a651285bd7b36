"""Many small tensors as one flat array per dtype, and back, strictly.

Every array of a message costs Flower two objects and as many requests, so an adapter travels as one flat array and a
table of contents. Decoding trusts nothing: the table must list exactly the expected tensors, in order, and the flat
arrays must hold exactly their numbers.

Wire format 2: ``table`` is JSON with the keys of :class:`Table`; ``arrays`` maps ``float32``, ``float64``, ``float16``
or ``bfloat16`` (as int16 bits, which NumPy's .npy format can carry) to the concatenated, C-ordered values. An upload
may carry changes instead, of its float32 tensors together: ``int8`` levels, or ``positions`` and ``values`` of the
largest. Any array may be losslessly coded; it is then bytes (uint8).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .adapter import AdapterSpec, AdapterState, Policy, TensorSpec, explain_shape
from .compression import coded, decoded, largest, quantise, restored
from .errors import UserError

VERSION = 2
#: No message is larger, in bytes, and no array of it once inflated.
LIMIT = 2 << 30
#: The texts of a message together take no more than one part of this many: read, they grow.
_TEXTS = 64
#: What :func:`agree` came to last: both ends ask anew with every message.
_AGREED: OrderedDict[tuple[object, ...], AdapterSpec] = OrderedDict()
#: Tables of contents that were read last, by their text.
_READ: OrderedDict[str, Table] = OrderedDict()
_KEEP = 64
#: Longer texts are read anew each time, so that a stranger's do not stay in memory.
_KEPT_TEXT = 1 << 18
#: Beyond any tensor; sizes stay numbers that a processor multiplies at once.
_MOST_AXES, _LONGEST_AXIS = 8, 1 << 40
_POLICIES: tuple[Policy, ...] = ("freeze", "local", "receive")
FORMS = ("plain", "int8", "topk")
_LARGEST_STEP = float(np.finfo(np.float32).max)
_NARROW = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Table:
    """The table of contents of a packed adapter.

    ``spec``: digest of the sender's :class:`AdapterSpec`; ``state``: digest of the full state that results;
    ``rest``: digest of the state that fills the tensors that are not listed (empty: all are listed);
    ``freeze``, ``local`` and ``receive``: positions of the tensors of the spec with these policies; ``extras``: name,
    shape, dtype and role of what accompanies the adapter. ``form``: plain, or how the changes of an upload are
    packed, then with ``steps`` (int8's, a tensor) and ``kept`` (how many numbers topk carries). ``coded``: the arrays
    that are losslessly compressed.
    """

    version: int
    spec: str
    state: str
    rest: str
    wire: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    freeze: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()
    extras: tuple[tuple[str, tuple[int, ...], str, str], ...] = ()
    form: str = "plain"
    steps: tuple[float, ...] = ()
    kept: int = 0
    coded: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, sender: str) -> Table:
        """The inverse, strict. Raises :class:`UserError` that names ``sender``."""
        # A message's table is asked for by whoever handles it: the gate, the audit log, the server of a simulation.
        found = _READ.get(text)
        if found is None:
            if isinstance(text, str) and len(text) > most_text():
                raise UserError(f"{sender}: the adapter's table of contents takes {len(text)} bytes, too many")
            found = cls._read(text, sender)
            if len(text) <= _KEPT_TEXT:
                _READ[text] = found
            while len(_READ) > _KEEP:
                _READ.popitem(last=False)
        return found

    @classmethod
    def _read(cls, text: str, sender: str) -> Table:
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
            tensors = tuple((_text(name), _shape(shape)) for name, shape in _list(values["tensors"]))
            positions: dict[str, Any] = {key: _naturals(values[key]) for key in _POLICIES}
            extras = tuple(
                (_text(name), _shape(shape), _text(dtype), _text(role))
                for name, shape, dtype, role in _list(values["extras"])
            )
            for name, shape, dtype, role in extras:
                TensorSpec(name, shape, dtype, role)
            texts: dict[str, Any] = {key: _text(values[key]) for key in ("spec", "state", "rest", "wire", "form")}
            if texts["wire"] not in ("fp32", "fp16", "bf16") or texts["form"] not in FORMS:
                raise ValueError("not a wire dtype or form")
            steps = tuple(_step(step) for step in _list(values["steps"]))
            (kept,) = _shape([values["kept"]])
            coded = tuple(_text(key) for key in _list(values["coded"]))
        except (TypeError, ValueError):
            raise UserError(f"{sender}: the adapter's table of contents is malformed") from None
        return cls(VERSION, tensors=tensors, extras=extras, steps=steps, kept=kept, coded=coded, **positions, **texts)


def most_text() -> int:
    """How long the texts of a message may be together."""
    return LIMIT // _TEXTS


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _step(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST_STEP:
        raise ValueError("not a step")
    return float(value)


def _naturals(value: object) -> tuple[int, ...]:
    numbers = _list(value)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not natural numbers")
    return tuple(numbers)


def _shape(value: object) -> tuple[int, ...]:
    numbers = _naturals(value)
    if len(numbers) > _MOST_AXES or max(numbers, default=0) > _LONGEST_AXIS:
        raise ValueError("not a shape")
    return numbers


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
    state: AdapterState, *, wire: str = "fp32", whole: str | None = None, rest: str = "", code: bool = False
) -> tuple[dict[str, np.ndarray], Table]:
    """Flatten ``state`` into one array per dtype and its table.

    ``whole``: digest of the full state when ``state`` is a part of it; ``rest``: digest of the state that the receiver
    already holds and takes the other tensors from; ``code``: compress losslessly what that makes smaller. Raises
    :class:`UserError` that names a non-finite tensor, also one that overflows the narrow ``wire`` dtype.
    """
    state.require_finite()
    parts: dict[str, list[np.ndarray]] = {}
    for name, array in state.items():
        carrier, flat = _carried(state.spec.by_name[name], array, wire)
        parts.setdefault(carrier, []).append(flat)
    arrays, squeezed = _squeezed({carrier: np.concatenate(chunks) for carrier, chunks in parts.items()}, code)
    return arrays, _table(state, wire, whole or state.digest, rest=rest, coded=squeezed)


def pack_change(
    state: AdapterState,
    base: AdapterState,
    form: str,
    *,
    fraction: float,
    random: np.random.Generator,
    owed: np.ndarray | None = None,
    code: bool = False,
) -> tuple[dict[str, np.ndarray], Table, np.ndarray]:
    """``state`` as its change since ``base``, lossily: ``form`` int8 or topk, over all its float32 tensors.

    ``owed``: what the last uploads left out of the change (topk), added to this one. Returns the arrays, the table, and
    what is owed now: change + owed - sent. Tensors of other dtypes, and those that ``base`` lacks, are not for
    this form: raises :class:`UserError` that names one. Source of the error feedback: Stich et al. 2018, arXiv
    1809.07599.
    """
    state.require_finite()
    for name, array in state.items():
        if array.dtype != np.float32 or name not in base or base[name].shape != array.shape:
            raise UserError(f"server.upload {form} is for float32 tensors that the server has, which {name} is not")
    change = np.concatenate([(array.astype(np.float64) - base[name]).reshape(-1) for name, array in state.items()])
    if owed is not None and form == "topk" and owed.shape == change.shape:
        change = change + owed
    arrays: dict[str, np.ndarray] = {}
    steps: tuple[float, ...] = ()
    kept = 0
    if form == "int8":
        parts = [quantise(part, random) for part in _split(change, state)]
        arrays["int8"] = np.concatenate([levels for levels, _ in parts])
        steps = tuple(step for _, step in parts)
        sent = np.concatenate([restored(*part) for part in parts])
    else:
        positions, values = largest(change, fraction)
        arrays["positions"], arrays["values"] = positions, values.astype(np.float32)
        kept = len(positions)
        sent = np.zeros_like(change)
        sent[positions] = arrays["values"]
    arrays, squeezed = _squeezed(arrays, code)
    table = _table(state, "fp32", base.digest, form=form, steps=steps, kept=kept, coded=squeezed)
    return arrays, table, change - sent


def _carried(tensor: TensorSpec, array: np.ndarray, wire: str) -> tuple[str, np.ndarray]:
    """The flat form in which a tensor travels, and the array it goes into."""
    name, carrier = tensor.name, _carrier(tensor.dtype, wire)
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
    return carrier, flat


def _squeezed(arrays: dict[str, np.ndarray], code: bool) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """``arrays`` with those losslessly coded that become smaller by it, and which those are."""
    if not code:
        return arrays, ()
    smaller = {key: np.frombuffer(coded(array), dtype=np.uint8) for key, array in arrays.items()}
    smaller = {key: array for key, array in smaller.items() if array.nbytes < arrays[key].nbytes}
    return {**arrays, **smaller}, tuple(sorted(smaller))


def _table(state: AdapterState, wire: str, digest: str, **values: Any) -> Table:
    spec = state.spec
    values |= {policy: tuple(i for i, t in enumerate(spec.tensors) if t.policy == policy) for policy in _POLICIES}
    values |= {"tensors": tuple((name, array.shape) for name, array in state.items())}
    values |= {"extras": tuple((t.name, t.shape, t.dtype, t.role) for t in spec.extras)}
    return Table(VERSION, spec=spec.digest, state=digest, wire=wire, **{"rest": "", **values})


def _split(flat: np.ndarray, like: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([array.size for array in like.values()])[:-1])


def agree(table: Table, spec: AdapterSpec, sender: str) -> AdapterSpec:
    """``spec`` with the policies of ``table``; raises :class:`UserError` unless both ends mean the same adapter."""
    key = (spec.digest, table.spec, table.freeze, table.local, table.receive, table.extras)
    if key not in _AGREED:
        extras = [TensorSpec(name, shape, dtype, role) for name, shape, dtype, role in table.extras]
        own = spec.bare
        described = set(own.names)
        for extra in extras:
            if extra.name in described:
                raise UserError(f"{sender}: tensor {extra.name} is described twice")
            described.add(extra.name)
        agreed = own.with_extras(extras)
        if max((*table.freeze, *table.local, *table.receive), default=-1) >= len(agreed.tensors):
            raise UserError(f"{sender}: the adapter has more tensors than this end's {spec.method} adapter")
        for policy in _POLICIES:
            names = {agreed.tensors[i].name for i in getattr(table, policy)}
            agreed = agreed.with_policy(policy, lambda t, names=names: t.name in names)  # type: ignore[misc]
        if agreed.digest != table.spec:
            _explain_difference(table, agreed, sender)
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
    base: AdapterState | None = None,
) -> AdapterState:
    """The inverse of :func:`pack`, and of :func:`pack_change`, which needs the ``base`` that changed.

    ``spec``: what this end expects; ``names``: the tensors that must be listed, no more and no fewer (default: all of
    the spec, or with ``table.rest`` whatever is listed, the others coming from ``held``).
    Raises :class:`UserError` that names ``sender`` and the first unknown, missing, duplicated, mis-shaped or
    non-finite tensor.
    """
    agreed = agree(table, spec, sender)
    by_name = agreed.by_name
    listed = [name for name, _ in table.tensors]
    seen: set[str] = set()
    for name, shape in table.tensors:
        if name in seen:
            raise UserError(f"{sender}: tensor {name} is listed twice")
        seen.add(name)
        if name not in by_name:
            raise UserError(f"{sender}: unknown tensor {name}")
        if shape != by_name[name].shape:
            raise UserError(f"{sender}: {explain_shape(name, shape, by_name[name].shape)}")
    if names is not None:
        wanted = list(names)
    elif table.rest:
        wanted = [name for name in agreed.names if name in seen]
    else:
        wanted = list(agreed.names)
    if listed != wanted:
        for name in wanted:
            if name not in seen:
                raise UserError(f"{sender}: tensor {name} is missing")
        for name in listed:
            if name not in wanted:
                raise UserError(f"{sender}: tensor {name} is not among the declared tensors")
        raise UserError(f"{sender}: the tensors are not in the order of the adapter's description")
    arrays = _plain(arrays, table, agreed, sender)
    tensors = _cut(arrays, table, agreed, sender) if table.form == "plain" else _changed(arrays, table, base, sender)
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
    if table.form == "plain" and table.wire == "fp32" and state.digest != table.state:
        raise UserError(f"{sender}: the adapter's tensors do not match the digest that was sent with them")
    return state


def _plain(arrays: Mapping[str, np.ndarray], table: Table, spec: AdapterSpec, sender: str) -> Mapping[str, np.ndarray]:
    """``arrays`` with those that are losslessly coded as they were."""
    numbers: dict[str, tuple[str, int]] = {}
    sizes = [spec.by_name[name].size for name, _ in table.tensors]
    if table.form == "plain":
        for (name, _), size in zip(table.tensors, sizes, strict=True):
            carrier = _carrier(spec.by_name[name].dtype, table.wire)
            stored = "int16" if carrier == "bfloat16" else carrier
            numbers[carrier] = (stored, numbers.get(carrier, ("", 0))[1] + size)
    elif table.form == "int8":
        numbers["int8"] = ("int8", sum(sizes))
    else:
        numbers["positions"], numbers["values"] = ("uint32", table.kept), ("float32", table.kept)
    if table.kept > sum(sizes):
        raise UserError(f"{sender}: sends {table.kept} of {sum(sizes)} numbers")
    found = dict(arrays)
    for key in table.coded:
        if key not in found or key not in numbers or found[key].dtype != np.uint8 or found[key].ndim != 1:
            raise UserError(f"{sender}: the packed {key} array is not the bytes that the table says")
        dtype, size = numbers[key]
        if size * np.dtype(dtype).itemsize > LIMIT:
            raise UserError(f"{sender}: the packed {key} array would inflate to {size} numbers, too many")
        try:
            found[key] = decoded(np.ascontiguousarray(found[key]).data, np.dtype(dtype), size)
        except UserError as error:
            raise UserError(f"{sender}: {error}") from None
    if table.form != "plain" and set(found) != set(numbers):
        raise UserError(f"{sender}: its arrays are not those of an upload packed as {table.form}")
    for key, (dtype, size) in numbers.items() if table.form != "plain" else ():
        if found[key].dtype.name != dtype or found[key].shape != (size,):
            raise UserError(f"{sender}: the packed {key} array should be {dtype}[{size}]")
    return found


def _changed(
    arrays: Mapping[str, np.ndarray], table: Table, base: AdapterState | None, sender: str
) -> dict[str, np.ndarray]:
    """The tensors of an upload that was packed as a change since ``base``."""
    if base is None:
        raise UserError(f"{sender}: sent a change, though this end knows nothing that could have changed")
    if table.state != base.digest:
        raise UserError(f"{sender}: its change is since another adapter than the one that it was sent")
    shapes = dict(table.tensors)
    for name, shape in table.tensors:
        if name not in base or base[name].shape != shape or base[name].dtype != np.float32:
            raise UserError(f"{sender}: tensor {name} cannot have changed: it was not sent")
    total = sum(base[name].size for name in shapes)
    if table.form == "int8":
        if len(table.steps) != len(shapes):
            raise UserError(f"{sender}: {len(table.steps)} steps for {len(shapes)} tensors")
    else:
        at = arrays["positions"]
        if at.size and (at[-1] >= total or (at[1:] <= at[:-1]).any()):
            raise UserError(f"{sender}: the positions of its numbers are not ascending positions of the adapter")
    tensors: dict[str, np.ndarray] = {}
    start = 0
    # One tensor at a time: float64 of all of them together would take a multiple of the message.
    for number, (name, shape) in enumerate(shapes.items()):
        end = start + base[name].size
        if table.form == "int8":
            change = restored(arrays["int8"][start:end], table.steps[number])
        else:
            first, last = np.searchsorted(at, (start, end))
            change = np.zeros(end - start)
            change[at[first:last].astype(np.int64) - start] = arrays["values"][first:last]
        with np.errstate(over="ignore", invalid="ignore"):
            tensors[name] = (base[name].astype(np.float64) + change.reshape(shape)).astype(np.float32)
        start = end
    return tensors


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
