"""Messages as a broken or hostile peer may send them: real ones, bent in ways that know what they are made of.

A fuzzer is a sequence that its seed alone decides, so a message that did harm is found again by seed and number.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Packed

#: What no honest end writes where a number, a text or a list belongs.
_ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63 - 1, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), True, False, None, "", "x", "\n\x00\x1b[2J", "é" * 50, "1", "NaN"),
    *([], [[]], {}, {"a": 1}, [0], [-1], [1e9], [2**40] * 9, [10**12, 10**12], ["a", "a"], [None]),
)
#: What fits into a record of settings; of metrics only the numbers and lists of numbers.
_NUMBERS = (0, -1, 2**63 - 1, 1.5, float("nan"), float("inf"), -float("inf"), 1e308)
_SETTINGS = (*_NUMBERS, True, "", "x" * 3000, "\x00\n", b"", b"\x80\x04.", [1, 2], [1.5], ["a"], [b"a"], [True])
_METRICS = (*_NUMBERS, 10**400, [1, 2], [float("nan")])
_DTYPES = ("float32", "float64", "float16", "int16", "int8", "uint8", "uint32", "object", "O", "bool", "U9", "nonsense")
_NAMES = ("adapter", "table", "job", "site", "metrics", "privacy", "facts", "notes", "", "\n", "x" * 500)


@dataclass(frozen=True)
class Bent:
    """A message, and the changes that made it."""

    content: RecordDict
    origin: RecordDict
    changes: tuple[str, ...]


class Fuzzer:
    """Bends the messages of ``corpus``; what it makes holds at most about ``most`` bytes."""

    def __init__(self, seed: int, corpus: Sequence[RecordDict], most: int) -> None:
        self.random = random.Random(seed)
        self.corpus = corpus
        self.most = most
        self._ways: tuple[Callable[[dict[str, Any]], None], ...] = (
            *(self.record_gone, self.record_renamed, self.record_of_another_kind, self.record_empty),
            *(self.entry_changed, self.entry_gone, self.entry_added, self.nested, self.long_text),
            *(self.text_changed, self.text_changed, self.text_changed, self.text_broken, self.names_twice),
            *(self.array_relabelled, self.array_bytes, self.array_head, self.array_nonfinite, self.array_archive),
            *(self.array_bomb, self.array_added, self.array_retyped, self.many_entries),
        )

    def next(self) -> Bent:
        """The next message. Some are what is left of random bytes, or of bytes that changed on the way."""
        origin = self.random.choice(self.corpus)
        if self.random.random() < 0.1:
            content = self._through_bytes(origin)
            if content is not None:
                return Bent(content, origin, ("bytes",))
        records: dict[str, Any] = {key: _copy(record) for key, record in origin.items()}
        changes = []
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 5))):
            way = self.random.choice(self._ways)
            way(records)
            changes.append(way.__name__)
        return Bent(RecordDict(records), origin, tuple(changes))

    def _through_bytes(self, origin: RecordDict) -> RecordDict | None:
        """``origin`` with some bytes changed, as Flower reads it; None where it cannot."""
        data = self._bytes_changed(recorddict_to_proto(origin).SerializeToString())
        try:
            return recorddict_from_proto(Packed.FromString(data))
        except Exception:  # Flower's own reader stands before ours and says no in many ways
            return None

    # Records

    def record_gone(self, records: dict[str, Any]) -> None:
        records.pop(self._key(records), None)

    def record_renamed(self, records: dict[str, Any]) -> None:
        if records:
            records[self.random.choice(_NAMES)] = records.pop(self._key(records))

    def record_of_another_kind(self, records: dict[str, Any]) -> None:
        kinds = (ConfigRecord({"x": "y"}), MetricRecord({"x": 1}), ArrayRecord({"x": Array(np.zeros(3))}))
        records[self._key(records)] = _copy(self.random.choice(kinds))

    def record_empty(self, records: dict[str, Any]) -> None:
        records[self._key(records)] = self.random.choice((ConfigRecord, MetricRecord, ArrayRecord))()

    def entry_changed(self, records: dict[str, Any]) -> None:
        record = self._record(records, ConfigRecord, MetricRecord)
        if record:
            odd = _METRICS if isinstance(record, MetricRecord) else _SETTINGS
            record[self.random.choice(list(record))] = self.random.choice(odd)

    def entry_gone(self, records: dict[str, Any]) -> None:
        record = self._record(records, ConfigRecord, MetricRecord, ArrayRecord)
        if record:
            del record[self.random.choice(list(record))]

    def entry_added(self, records: dict[str, Any]) -> None:
        record = self._record(records, ConfigRecord, MetricRecord)
        if record is not None:
            odd = _METRICS if isinstance(record, MetricRecord) else _SETTINGS
            record[self.random.choice((*_NAMES, "json", "loss", "epsilon"))] = self.random.choice(odd)

    def many_entries(self, records: dict[str, Any]) -> None:
        """As many as there is room for in one record."""
        record = self._record(records, ConfigRecord, MetricRecord)
        if record is not None:
            for number in range(self.random.choice((10, 100, self.most // 400))):
                record[f"entry{number}"] = number

    # Texts: the job's configuration and the table of contents

    def text_changed(self, records: dict[str, Any]) -> None:
        """A value somewhere in the JSON becomes another, or is there twice, or is gone."""
        self._json(records, self._value_changed)

    def names_twice(self, records: dict[str, Any]) -> None:
        def twice(value: Any) -> Any:
            if isinstance(value, dict) and isinstance(value.get("tensors"), list) and value["tensors"]:
                key = self.random.choice(("tensors", "extras"))
                named = self.random.choice(value["tensors"])
                if isinstance(value.get(key), list) and isinstance(named, list):  # they may have been bent before
                    value[key] = [*value[key], named if key == "tensors" else [*named, "float32", "weight"]]
            return value

        self._json(records, twice)

    def text_broken(self, records: dict[str, Any]) -> None:
        """Some of its characters are others, or it ends early, or it is the middle of another."""
        self._text(records, lambda text: self._bytes_changed(text.encode()).decode("utf-8", "replace"))

    def nested(self, records: dict[str, Any]) -> None:
        deep = self.random.choice((20, 100, 2000, self.most // 4))
        opened, closed = self.random.choice((("[", "]"), ('{"a":', "}"), ("[", "")))
        whole = opened * deep + "1" + closed * deep

        def somewhere(text: str) -> str:
            at = self.random.randrange(len(text) + 1)
            return self.random.choice((whole, text[:at] + whole + text[at:]))

        self._text(records, somewhere)

    def long_text(self, records: dict[str, Any]) -> None:
        """Much that is small in the message and large once it is read."""
        count = self.random.choice((10, 100, 1000, self.most // 8))
        unit = self.random.choice(("[],", "{},", '"a",', "1,", "1e9,", "null,"))
        key = self.random.choice(("tensors", "extras", "freeze", "steps", "coded", "sites", "labels", "model"))
        many = f"[{(unit * count)[:-1]}]"

        def swollen(text: str) -> str:
            at = text.find(f'"{key}":')
            return many if at < 0 else f'{text[: at + len(key) + 3]}{many},"z":{text[at + len(key) + 3 :]}'

        self._text(records, swollen)

    # Arrays

    def array_relabelled(self, records: dict[str, Any]) -> None:
        self._array(
            records,
            lambda a: Array(
                self.random.choice((a.dtype, *_DTYPES)),
                self.random.choice((tuple(a.shape), (), (0,), (-1,), (1 << 40,), (2, 3), (10**12, 10**12), (1,) * 70)),
                self.random.choice((a.stype, a.stype, "pickle", "")),
                a.data,
            ),
        )

    def array_bytes(self, records: dict[str, Any]) -> None:
        self._array(records, lambda a: Array(a.dtype, a.shape, a.stype, self._bytes_changed(a.data)))

    def array_head(self, records: dict[str, Any]) -> None:
        """A head that declares what is not there."""
        descr = self.random.choice(("'<f4'", "'>f4'", "'<f8'", "'|O'", "'<U1000000'", "[('a','<f4')]", "'|V0'", "1"))
        shape = self.random.choice(("(6,)", "(10**9,)", f"({1 << 40},)", "(-1,)", "()", "(1,)*9", "(99999999999999,)"))
        head = f"{{'descr': {descr}, 'fortran_order': {self.random.choice((True, False))}, 'shape': {shape}, }}"
        version = self.random.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
        width = 2 if version == b"\x01\x00" else 4
        data = b"\x93NUMPY" + version + len(head).to_bytes(width, "little") + head.encode()
        self._array(records, lambda a: Array(a.dtype, a.shape, a.stype, data + a.data[self.random.randrange(200) :]))

    def array_nonfinite(self, records: dict[str, Any]) -> None:
        def spoilt(array: Array) -> Array:
            try:
                read = array.numpy()
            except Exception:  # an array that was bent before
                return array
            # No values to spoil; of entries without bytes (|V0) there may be 10**14, which a copy would walk through.
            if not isinstance(read, np.ndarray) or read.dtype.kind not in "fi":
                return array
            numbers = np.array(read)
            if numbers.size and numbers.dtype.kind == "f":
                odd = self.random.choice((np.nan, np.inf, -np.inf))
                numbers.reshape(-1)[self.random.randrange(numbers.size)] = odd
            elif numbers.size and numbers.dtype == np.int16:
                numbers[self.random.randrange(numbers.size)] = self.random.choice((0x7F80, 0x7FC0, -128))
            return Array(numbers)

        self._array(records, spoilt)

    def array_archive(self, records: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.npy", bytes(100_000))
        data = self.random.choice((buffer.getvalue(), b"\x80\x04cposix\nsystem\n."))
        self._array(records, lambda a: Array(a.dtype, a.shape, a.stype, data))

    def array_bomb(self, records: dict[str, Any]) -> None:
        """A thousandfold, said to be a coded array, of a tensor that the table may declare as large."""
        size = self.random.choice((100, 10_000, self.most * 20))
        data = _squeezed(size)
        self._array(records, lambda a: Array(data))

        def declared(value: Any) -> Any:
            if isinstance(value, dict) and isinstance(value.get("coded"), list):
                value["coded"] = [self.random.choice(("float32", "int8", "positions", "values", "bfloat16"))]
                if self.random.random() < 0.5 and isinstance(value.get("extras"), list):
                    value["extras"] = [["bomb", [size // 4], "float32", "weight"]]
            return value

        self._json(records, declared)

    def array_added(self, records: dict[str, Any]) -> None:
        record = self._record(records, ArrayRecord)
        if record is not None:
            record[self.random.choice(("float64", "float32", "values", "x", ""))] = Array(np.ones(3, np.float32))

    def array_retyped(self, records: dict[str, Any]) -> None:
        def other(array: Array) -> Array:
            kinds = (np.float64, np.float16, np.int8, np.uint8, np.uint32, np.complex64, np.bool_, "U3", "M8[s]")
            return Array(np.zeros(self.random.choice((0, 6, 20, (2, 3))), np.dtype(self.random.choice(kinds))))

        self._array(records, other)

    # Choices

    def _key(self, records: dict[str, Any]) -> str:
        return self.random.choice(list(records)) if records else "site"

    def _record(self, records: dict[str, Any], *kinds: type) -> Any:
        fitting = [record for record in records.values() if isinstance(record, kinds)]
        return self.random.choice(fitting) if fitting else None

    def _array(self, records: dict[str, Any], change: Callable[[Array], Array]) -> None:
        record = self._record(records, ArrayRecord)
        if record:
            key = self.random.choice(list(record))
            record[key] = change(record[key])

    def _text(self, records: dict[str, Any], change: Callable[[str], str]) -> None:
        """Change the longest text of a record."""
        record = self._record(records, ConfigRecord)
        texts = {key: value for key, value in (record or {}).items() if isinstance(value, str)}
        if texts:
            key = max(texts, key=lambda each: len(texts[each]))
            record[key] = change(texts[key])[: self.most]

    def _json(self, records: dict[str, Any], change: Callable[[Any], Any]) -> None:
        def changed(text: str) -> str:
            try:
                return json.dumps(change(json.loads(text)))
            except (ValueError, RecursionError):
                return text

        self._text(records, changed)

    def _value_changed(self, value: Any) -> Any:
        """``value`` with one of its parts changed, anywhere."""
        if isinstance(value, dict) and value and self.random.random() < 0.9:
            key = self.random.choice(list(value))
            if self.random.random() < 0.1:
                del value[key]
            else:
                value[key] = self._value_changed(value[key])
            return value
        if isinstance(value, list) and value and self.random.random() < 0.8:
            at = self.random.randrange(len(value))
            how = self.random.random()
            if how < 0.1:
                del value[at]
            elif how < 0.2:
                value.append(value[at])
            elif how < 0.25:
                self.random.shuffle(value)
            else:
                value[at] = self._value_changed(value[at])
            return value
        return self.random.choice(_ODD)

    def _bytes_changed(self, data: bytes) -> bytes:
        how = self.random.randrange(6)
        if how == 0:
            return self.random.randbytes(self.random.choice((0, 1, 10, 300)))
        at = self.random.randrange(len(data) + 1)
        if how == 1:
            return data[:at]
        if how == 2:
            return data + self.random.randbytes(self.random.choice((1, 8, 1000)))
        if how == 3:
            return data[:at] + self.random.randbytes(self.random.choice((1, 4))) + data[at:]
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 4, 30))):
            if changed:
                changed[self.random.randrange(len(changed))] = self.random.randrange(256)
        return bytes(changed)


@lru_cache
def _squeezed(size: int) -> np.ndarray:
    return np.frombuffer(zlib.compress(bytes(size), 9), dtype=np.uint8)


def _copy(record: Any) -> Any:
    return type(record)(dict(record))
