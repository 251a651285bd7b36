"""Messages between server and site: the only file of ``core`` that knows Flower.

A few records, all declared here; a record, key or metric that is not declared is refused at the receiving end, so what
leaves a site is exactly this list.

    instruction (server -> site): ``job`` (run, round, site, configuration, base-model fingerprint),
                                  ``adapter`` + ``table``, ``secure``
    answer      (site -> server): ``site`` (name, round, error, code), ``metrics``, ``privacy``, ``facts``,
                                  ``adapter`` + ``table``, ``secure``, ``masked``

``secure`` is a message of the secure sum (:mod:`fedgraft.privacy.securesum.messages`), ``masked`` what stands for an
adapter there.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SType

from . import packing
from .adapter import AdapterSpec, AdapterState
from .errors import PrivateError, UserError, one_line
from .packing import Table, pack, pack_change, unpack
from .profile import section
from .update import PrivacyStatement

Kind = Literal["hello", "keys", "shares", "train", "agree", "reveal", "refine", "evaluate"]
#: The exchanges of a secure sum beside the training itself.
STEPS: tuple[Kind, ...] = ("keys", "shares", "agree", "reveal")
#: What became of a site that was asked and did not contribute: it is not there, it does not answer in time, its process
#: fails, or what it sends (a line that says why it cannot, or an answer that does not pass) does not count.
Fault = Literal["absent", "late", "crashed", "refused"]
FAULTS: tuple[Fault, ...] = ("absent", "late", "crashed", "refused")

#: Every metric that may leave a site, by the kind of message. ``loss`` only where no privacy is promised.
METRICS: Mapping[str, tuple[str, ...]] = {
    "hello": ("records", "held_out", "units"),
    **dict.fromkeys(STEPS, ()),
    "train": ("records", "steps", "loss"),
    "refine": ("records",),
    "evaluate": ("examples", "correct", "loss_sum"),
}
NEEDS_STATE = "needs-state"
#: The arrays that packing makes.
_DTYPES = ("float32", "float64", "float16", "int16", "int8", "uint8", "uint32", "uint64")
#: What NumPy may take for the head of an array of few dimensions.
_HEAD = 1 << 12
_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
#: Texts from this length on are measured once.
_LONG = 1000
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

#: The entries of a privacy statement, and what they are where nothing is stated.
_STATEMENT: Mapping[str, Any] = asdict(PrivacyStatement(enabled=False))

#: A run, a site or a fingerprint is no longer: each is written into logs and ledgers.
_LONGEST_NAME = 256
#: The records of a message, and the kind of each.
_INSTRUCTION: Mapping[str, type] = {
    "job": ConfigRecord,
    "adapter": ArrayRecord,
    "table": ConfigRecord,
    "secure": ConfigRecord,
}
_ANSWER: Mapping[str, type] = {
    "site": ConfigRecord,
    "metrics": MetricRecord,
    "privacy": ConfigRecord,
    "facts": ConfigRecord,
    "adapter": ArrayRecord,
    "table": ConfigRecord,
    "secure": ConfigRecord,
    "masked": ArrayRecord,
}


def encode_adapter(
    state: AdapterState, *, wire: str, whole: str | None = None, rest: str = "", code: bool = False
) -> RecordDict:
    """``adapter`` and ``table`` records; see :func:`fedgraft.core.packing.pack`."""
    with section("wire"):
        return _records(*pack(state, wire=wire, whole=whole, rest=rest, code=code))


def encode_change(
    state: AdapterState,
    base: AdapterState,
    form: str,
    *,
    fraction: float,
    random: np.random.Generator,
    owed: np.ndarray | None = None,
    code: bool = False,
) -> tuple[RecordDict, np.ndarray]:
    """The same for a change, and what is owed after it; see :func:`fedgraft.core.packing.pack_change`."""
    with section("wire"):
        arrays, table, owed = pack_change(state, base, form, fraction=fraction, random=random, owed=owed, code=code)
        return _records(arrays, table), owed


def _records(arrays: Mapping[str, np.ndarray], table: Table) -> RecordDict:
    return RecordDict(
        {
            "adapter": ArrayRecord({key: _packed(array) for key, array in arrays.items()}),
            "table": ConfigRecord({"json": table.to_json()}),
        }
    )


def _packed(array: np.ndarray) -> Array:
    """What ``Array(array)`` makes, with one copy of the numbers instead of three."""
    dtype = array.dtype.name
    head = _head(dtype, array.shape)
    return (
        Array(dtype, array.shape, SType.NUMPY, b"".join((head, np.ascontiguousarray(array).data)))
        if head
        else Array(array)
    )


def record_of(content: RecordDict, key: str, kind: type[R]) -> R | None:
    """The record called ``key``; None where there is none of that ``kind``.

    Flower's own views by kind make every record of the message anew.
    """
    record = content.get(key)
    return record if isinstance(record, kind) else None


def decode_table(content: RecordDict, sender: str) -> Table:
    record = record_of(content, "table", ConfigRecord)
    text = record.get("json") if record is not None else None
    if not isinstance(text, str) or len(record or ()) != 1:
        raise UserError(f"{sender}: the message holds no adapter")
    return Table.from_json(text, sender)


def decode_adapter(
    content: RecordDict,
    spec: AdapterSpec,
    *,
    sender: str,
    names: Iterable[str] | None = None,
    held: AdapterState | None = None,
    base: AdapterState | None = None,
) -> AdapterState:
    """Strict inverse of :func:`encode_adapter` and :func:`encode_change`; see :func:`~.packing.unpack`."""
    table = decode_table(content, sender)
    packed = record_of(content, "adapter", ArrayRecord)
    arrays = {key: _numbers(key, array, sender) for key, array in packed.items()} if packed is not None else {}
    return unpack(arrays, table, spec, sender=sender, names=names, held=held, base=base)


def encode_secure(message: bytes) -> RecordDict:
    """The ``secure`` record."""
    return RecordDict({"secure": ConfigRecord({"message": message})})


def decode_secure(content: RecordDict, sender: str) -> bytes:
    """The inverse of :func:`encode_secure`."""
    record = record_of(content, "secure", ConfigRecord)
    message = record.get("message") if record is not None else None
    if not isinstance(message, bytes) or len(record or ()) != 1:
        raise UserError(f"{sender}: the message holds nothing of the secure sum")
    return message


def encode_masked(entries: np.ndarray) -> RecordDict:
    """The ``masked`` record, of a flat array of uint32 or uint64."""
    with section("wire"):
        return RecordDict({"masked": ArrayRecord({"entries": _packed(entries)})})


def decode_masked(content: RecordDict, sender: str) -> np.ndarray:
    """The inverse of :func:`encode_masked`; of any shape and dtype."""
    record = record_of(content, "masked", ArrayRecord)
    if record is None or set(record) != {"entries"}:
        raise UserError(f"{sender}: the message holds no masked numbers")
    with section("wire"):
        return _numbers("entries", record["entries"], sender)


def _numbers(key: str, array: Array, sender: str) -> np.ndarray:
    """What ``array`` holds and nothing else: not copied where it is written as this end would write it."""
    head = _head(array.dtype, array.shape)
    if array.stype == SType.NUMPY and head and array.data.startswith(head):
        size = math.prod(array.shape)
        if len(array.data) == len(head) + size * np.dtype(array.dtype).itemsize:
            return np.frombuffer(array.data, array.dtype, size, len(head)).reshape(array.shape)
    try:
        if array.stype != SType.NUMPY:
            raise TypeError(f"its serialisation is {array.stype}")
        stream = io.BytesIO(array.data[:_HEAD])
        shape, column_wise, dtype = _HEADS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:
        raise UserError(f"{sender}: the packed {key} array cannot be read: {one_line(error)}") from None
    if dtype.name not in _DTYPES or (column_wise and len(shape) > 1):
        raise UserError(f"{sender}: the packed {key} array holds {dtype.name}, which is never sent")
    # np.load would make room for whatever the head declares before it reads a number.
    declared, there = math.prod(shape) * dtype.itemsize, len(array.data) - stream.tell()
    if min(shape, default=0) < 0 or declared != there:
        raise UserError(f"{sender}: the packed {key} array declares {declared} bytes of numbers and holds {there}")
    return np.frombuffer(array.data, dtype, math.prod(shape), stream.tell()).reshape(shape)


@lru_cache(maxsize=64)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before the numbers of a flat array of ``dtype``; nothing for one that is never sent."""
    if dtype not in _DTYPES or len(shape) != 1:
        return b""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


@dataclass(frozen=True)
class Job:
    """What every instruction carries beside the adapter."""

    run: str
    round: int
    site: str
    config: str
    fingerprint: str

    def to_record(self) -> ConfigRecord:
        return ConfigRecord({f.name: getattr(self, f.name) for f in fields(self)})


def decode_job(content: RecordDict) -> Job:
    _refuse_undeclared(content, _INSTRUCTION, "the server")
    record = record_of(content, "job", ConfigRecord)
    if record is None:
        raise UserError("the server's message holds no job; is the server fedgraft too?")
    wanted = {"run": str, "round": int, "site": str, "config": str, "fingerprint": str}
    if set(record) != set(wanted):
        raise UserError(f"the server's job has an unknown or missing entry `{sorted(set(record) ^ set(wanted))[0]}`")
    for key, kind in wanted.items():
        if type(record[key]) is not kind:
            raise UserError(f"the server's job entry `{key}` is not a {kind.__name__}")
        if key != "config" and kind is str and len(str(record[key])) > _LONGEST_NAME:
            raise UserError(f"the server's job entry `{key}` is longer than {_LONGEST_NAME} characters")
    return Job(**{key: record[key] for key in wanted})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Answer:
    """A site's answer, decoded except for the adapter (which needs the strategy's expectations)."""

    site: str
    round: int
    error: str = ""
    code: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    privacy: PrivacyStatement | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def encode_answer(
    kind: Kind,
    *,
    site: str,
    round: int,
    metrics: Mapping[str, float] | None = None,
    privacy: PrivacyStatement | None = None,
    adapter: RecordDict | None = None,
    facts: Mapping[str, str] | None = None,
) -> RecordDict:
    """A site's answer. ``facts``: the spec digest and base-model fingerprint of a hello, both strings."""
    undeclared = set(metrics or ()) - set(METRICS[kind])
    if undeclared:
        raise ValueError(f"metric {sorted(undeclared)[0]} is not declared for {kind}")
    content = RecordDict({"site": ConfigRecord({"name": site, "round": round, "error": "", "code": ""})})
    if metrics:
        content["metrics"] = MetricRecord(dict(metrics))
    if privacy is not None:
        content["privacy"] = ConfigRecord({key: getattr(privacy, key) for key in _STATEMENT})
    if facts:
        content["facts"] = ConfigRecord(dict(facts))
    for key, record in (adapter or {}).items():
        content[key] = record
    return content


def encode_refusal(error: BaseException, *, site: str, round: int, code: str = "") -> RecordDict:
    """The answer of a site that could not do its part: one line, no traceback, nothing else.

    Only a :class:`UserError` is quoted, and not one that may quote records: other texts could carry data out.
    """
    if isinstance(error, PrivateError):
        text = "its data cannot be used; the site's own log says why"
    elif isinstance(error, UserError):
        text = one_line(error)
    else:
        text = f"{type(error).__name__} at the site; the site's own log says more"
    return RecordDict({"site": ConfigRecord({"name": site, "round": round, "error": text, "code": code})})


def decode_answer(content: RecordDict, kind: Kind, sender: str) -> Answer:
    """Check every record but the adapter. Raises :class:`UserError` that names the sender and the entry."""
    _refuse_undeclared(content, _ANSWER, sender)
    record = record_of(content, "site", ConfigRecord)
    if record is None or set(record) != {"name", "round", "error", "code"}:
        raise UserError(f"{sender}: the answer does not say which site it is")
    name, number, error, code = (record[key] for key in ("name", "round", "error", "code"))
    if not (isinstance(name, str) and type(number) is int and isinstance(error, str) and isinstance(code, str)):
        raise UserError(f"{sender}: the answer does not say which site it is")
    metrics: dict[str, float] = {}
    for key, value in (record_of(content, "metrics", MetricRecord) or {}).items():
        if key not in METRICS[kind]:
            raise UserError(f"{name}: undeclared metric `{key}`")
        if isinstance(value, list):
            raise UserError(f"{name}: metric `{key}` is a list")
        if not _plausible(value):
            raise UserError(f"{name}: metric `{key}` is {_shown(value)}")
        metrics[key] = value
    facts = dict(record_of(content, "facts", ConfigRecord) or {})
    if set(facts) - {"spec", "fingerprint"} or not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{name}: undeclared fact in the answer")
    return Answer(
        site=name,
        round=number,
        error=error,
        code=code,
        metrics=metrics,
        privacy=_decode_privacy(content, name),
        facts=facts,  # type: ignore[arg-type]
    )


def _decode_privacy(content: RecordDict, site: str) -> PrivacyStatement | None:
    record = record_of(content, "privacy", ConfigRecord)
    if record is None:
        return None
    if set(record) != set(_STATEMENT):
        raise UserError(f"{site}: its privacy statement has an unknown or missing entry")
    values: dict[str, Any] = {}
    for key, default in _STATEMENT.items():
        value: Any = record[key]
        if not _fits(key, value, default):
            raise UserError(f"{site}: the entry `{key}` of its privacy statement is {_shown(value)}")
        values[key] = type(default)(value)
    return PrivacyStatement(**values)


def _shown(value: object) -> str:
    """``value`` for people: Python refuses to write a number of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return "a list" if isinstance(value, list) else repr(value)


def _fits(key: str, value: object, default: object) -> bool:
    if isinstance(default, bool | str):
        return type(value) is type(default) and (key != "unit" or value in ("record", "patient"))
    if isinstance(value, bool) or not isinstance(value, float | int) or not _plausible(value):
        return False
    if isinstance(default, int):
        return isinstance(value, int)
    return value <= 1 or key not in ("delta", "sampling_rate")


def _refuse_undeclared(content: RecordDict, declared: Mapping[str, type], sender: str) -> None:
    """Raise :class:`UserError` for a message that is too large, or for a record that is not declared."""
    texts = arrays = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            arrays += sum(len(name) + len(array.data) for name, array in record.items())
        else:
            texts += sum(len(key) + _size(value) for key, value in record.items())
    for size, most in ((texts, packing.most_text()), (arrays + texts, packing.LIMIT)):
        if size > most:
            raise UserError(f"{sender}: the message is too large: {size} bytes where at most {most} are read")
    for key in sorted(content):
        if key not in declared:
            raise UserError(f"{sender}: undeclared record `{key}` in the message")
        if not isinstance(content[key], declared[key]):
            raise UserError(f"{sender}: the record `{key}` is not a {declared[key].__name__}")


def _size(value: object) -> int:
    """About how many bytes an entry takes on the wire."""
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _plausible(value: float) -> bool:
    """Whether ``value`` can be a count or a loss: finite and not negative."""
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:
        return False


def fault_of(error: Error) -> Fault:
    """What Flower's error reply in place of an answer means."""
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "absent"
    expired = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
    return "late" if error.code in expired else "crashed"


def no_answer(message: Message, fault: Fault, why: str) -> Message:
    """Flower's error reply to ``message``, from a site that is absent, late or crashed."""
    codes = {"absent": ErrorCode.NODE_UNAVAILABLE, "late": ErrorCode.REPLY_MESSAGE_UNAVAILABLE}
    return Message(Error(codes.get(fault, ErrorCode.CLIENT_APP_RAISED_EXCEPTION), why), reply_to=message)


def content_bytes(content: RecordDict) -> int:
    """Payload of a message in bytes: array data and the JSON of everything else."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
            continue
        # The configuration of thousands of sites is one long text, and the same in every instruction.
        long = {key: text for key, text in record.items() if isinstance(text, str) and len(text) >= _LONG}
        raw = {key: data for key, data in record.items() if isinstance(data, bytes)}
        short = {key: "" if key in long or key in raw else value for key, value in record.items()}
        total += len(json.dumps(short, default=str)) + sum(_json_bytes(text) - 2 for text in long.values())
        total += sum(map(len, raw.values()))
    return total


@lru_cache(maxsize=8)
def _json_bytes(text: str) -> int:
    return len(json.dumps(text))
