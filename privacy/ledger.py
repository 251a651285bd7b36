"""The site's durable record of budget spent: written, and on the disk, before the first noisy step of a round.

One JSON line an event, with its own SHA-256 and that of the line before. An event is reserved before the training that
it pays for, so a crash at any moment can only have recorded too much, never too little. The hashes find damage and
careless edits; whoever may write the file can also write a new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .accounting import Event

_START = "0" * 64
_OWN = {"noise_multiplier", "sampling_rate", "steps", "unit", "before", "sha256"}


class Ledger:
    """An append-only file of :class:`Event` entries at ``path``; ``None`` keeps it in memory (for tests).

    ``unit``: the privacy unit (record or patient) that the entries protect. Where it is given it is written with each
    entry, and a ledger that holds another one is refused: what a record was promised says nothing of a patient.
    """

    def __init__(self, path: str | Path | None, unit: str | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.unit = unit
        self._memory: list[dict[str, Any]] = []

    def events(self) -> tuple[Event, ...]:
        """Everything spent, in order. Raises :class:`UserError` when an entry was changed or lost."""
        return self._events(self._entries())

    def reserve(self, event: Event, **about: str | int) -> tuple[Event, ...]:
        """Record that ``event`` is about to be spent and return all events, this one included.

        Returns only once the entry is on the disk. ``about``: what it is spent on (run, round), for people.
        """
        if taken := _OWN & set(about):
            raise ValueError(f"`{min(taken)}` is the ledger's own word")
        entry: dict[str, Any] = {
            **about,
            "noise_multiplier": event.noise_multiplier,
            "sampling_rate": event.sampling_rate,
            "steps": event.steps,
        }
        if self.unit is not None:
            entry["unit"] = self.unit
        if self.path is None:
            self._memory.append(entry)
            return self.events()
        try:
            with _locked(self.path) as file:
                entries, end, last = self._read(file)
                spent = self._events([*entries, entry])
                os.ftruncate(file, end)
                _append(file, end, _line(entry, last))
        except OSError as error:
            raise UserError(
                f"{self.path}: the ledger cannot be written, so nothing is trained: {error.strerror or error}"
            ) from None
        return spent

    def _events(self, entries: list[dict[str, Any]]) -> tuple[Event, ...]:
        for number, entry in enumerate(entries, 1):
            if self.unit is not None and entry.get("unit", self.unit) != self.unit:
                raise UserError(
                    f"{self.path}: line {number} protected each {entry['unit']}, this run protects each {self.unit}; "
                    "the two cannot be added up, so nothing is trained: keep to one privacy.unit on the same data"
                )
        return tuple(Event(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"]) for entry in entries)

    def _entries(self) -> list[dict[str, Any]]:
        if self.path is None:
            return list(self._memory)
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                return self._read(file)[0]
            finally:
                os.close(file)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: the ledger cannot be read: {error.strerror or error}") from None

    def _read(self, file: int) -> tuple[list[dict[str, Any]], int, str]:
        """Entries, the offset where whole ones end, and the hash that the next line must carry.

        A last line that a crash cut off does not count: nothing was trained on it. One that lacks only its line
        end does.
        """
        os.lseek(file, 0, os.SEEK_SET)
        content = bytearray()
        while chunk := os.read(file, 1 << 20):
            content += chunk
        *lines, tail = bytes(content).split(b"\n")
        entries: list[dict[str, Any]] = []
        last, end = _START, 0
        for number, line in enumerate(lines, 1):
            entry = _checked(line, last)
            if entry is None:
                raise UserError(
                    f"{self.path}: line {number} was changed or lost; the budget spent is unknown, "
                    "so nothing is trained"
                )
            entries.append(entry)
            last, end = entry["sha256"], end + len(line) + 1
        whole = _checked(tail, last)
        if whole is not None:
            entries.append(whole)
            last, end = whole["sha256"], end + len(tail)
        return entries, end, last


def _line(entry: dict[str, Any], before: str) -> bytes:
    """``entry`` as a line: chained to the line before, and with its own hash."""
    chained = {**entry, "before": before}
    own = hashlib.sha256(json.dumps(chained, sort_keys=True).encode()).hexdigest()
    return json.dumps({**chained, "sha256": own}, sort_keys=True).encode()


def _checked(line: bytes, before: str) -> dict[str, Any] | None:
    """The entry in ``line``, or None when it is not whole, not the one written, or does not follow ``before``."""
    try:
        entry = json.loads(line)
        content = {key: value for key, value in entry.items() if key not in ("before", "sha256")}
        if line != _line(content, before):
            return None
        Event(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry


def _append(file: int, end: int, line: bytes) -> None:
    """Write ``line`` at ``end``, on a line of its own, and return once it is on the disk."""
    starts_line = end == 0 or os.pread(file, 1, end - 1) == b"\n"
    rest = memoryview((b"" if starts_line else b"\n") + line + b"\n")
    os.lseek(file, end, os.SEEK_SET)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file at ``path``, created where needed, with nobody else in it; new folders are on the disk at the end."""
    changed = []
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
        changed.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        changed.append(path.parent)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        for folder in changed:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    finally:
        os.close(file)
