"""The site's durable record of budget spent: written, and on the disk, before the first noisy step of a round.

One JSON line an event, each with the SHA-256 of the line before it. An event is reserved before the training that it
pays for, so a crash at any moment can only have recorded too much, never too little.
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


class Ledger:
    """An append-only file of :class:`Event` entries at ``path``; ``None`` keeps it in memory (for tests)."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self._memory: list[dict[str, Any]] = []

    def events(self) -> tuple[Event, ...]:
        """Everything spent, in order. Raises :class:`UserError` when an entry was changed or lost."""
        return tuple(
            Event(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"]) for entry in self._entries()
        )

    def reserve(self, event: Event, **about: str | int) -> tuple[Event, ...]:
        """Record that ``event`` is about to be spent and return all events, this one included.

        Returns only once the entry is on the disk. ``about``: what it is spent on (run, round), for people.
        """
        entry: dict[str, Any] = {
            "noise_multiplier": event.noise_multiplier,
            "sampling_rate": event.sampling_rate,
            "steps": event.steps,
            **about,
        }
        if self.path is None:
            self._memory.append(entry)
            return self.events()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                entries, end, last = self._read(file)
                line = json.dumps({**entry, "before": last}, sort_keys=True)
                # A line cut off by a crash was never followed by training: it is written over.
                os.ftruncate(file, end)
                os.lseek(file, end, os.SEEK_SET)
                os.write(file, f"{line}\n".encode())
                os.fsync(file)
        except OSError as error:
            raise UserError(
                f"{self.path}: the ledger cannot be written, so nothing is trained: {error.strerror}"
            ) from None
        return tuple(
            Event(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"]) for entry in [*entries, entry]
        )

    @contextmanager
    def _locked(self) -> Iterator[int]:
        path = Path(str(self.path))
        fresh = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            if fresh:
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            os.close(file)

    def _entries(self) -> list[dict[str, Any]]:
        if self.path is None:
            return list(self._memory)
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: the ledger cannot be read: {error.strerror}") from None
        try:
            return self._read(file)[0]
        finally:
            os.close(file)

    def _read(self, file: int) -> tuple[list[dict[str, Any]], int, str]:
        """Entries, the offset where whole lines end, and the hash that the next line must carry."""
        os.lseek(file, 0, os.SEEK_SET)
        content = bytearray()
        while chunk := os.read(file, 1 << 20):
            content += chunk
        end = content.rfind(b"\n") + 1
        entries: list[dict[str, Any]] = []
        last = _START
        for number, line in enumerate(bytes(content[:end]).splitlines(), 1):
            try:
                entry = json.loads(line)
                if entry["before"] != last:
                    raise ValueError
                Event(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}: line {number} was changed or lost; the budget spent is unknown, so nothing is trained"
                ) from None
            last = hashlib.sha256(line).hexdigest()
            entries.append(entry)
        return entries, end, last
