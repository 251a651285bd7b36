"""An append-only file that loses nothing quietly: what a site's ledger and its audit log are written in.

One JSON line an entry, with its own SHA-256 and that of the line before. A line is on the disk before :meth:`append`
returns, so a crash can only leave a torn last line, which does not count and which the next one replaces. The hashes
find damage and careless edits; whoever may write the file can also write a new one.

A journal that is not ``durable`` leaves it to the operating system when its lines reach the disk: they outlive the
death of the process, not a loss of power. For simulated sites, which protect nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError

#: What a line adds to the entry that it holds.
CHAIN = ("before", "sha256")
_START = "0" * 64
_BLOCK = 1 << 12


class DamagedError(UserError):
    """A line of a journal is not the one that was written, or does not follow the line before it."""

    def __init__(self, path: Path, line: int, text: str) -> None:
        super().__init__(f"{path}: line {line} {text}")
        self.path = path
        self.line = line


class Journal:
    """The file at ``path``.

    ``name`` is what people call it; ``stop`` and ``damage`` end the sentences that tell them it cannot be written, and
    that a line of it was changed.
    """

    def __init__(self, path: Path, *, name: str, stop: str, damage: str, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._name = name
        self._stop = stop
        self._damage = damage
        # What was checked before, byte for byte: its entries, and the hash that the next line must carry.
        self._checked: tuple[bytes, list[dict[str, Any]], str] = (b"", [], _START)

    def entries(self) -> list[dict[str, Any]]:
        """All entries, every line checked; none where there is no file.

        A last line that a crash cut off does not count: nothing was done on the strength of it. One that lacks only
        its line end does.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: the {self._name} cannot be read: {error.strerror or error}") from None
        known, entries, last = self._checked
        if not content.startswith(known):
            known, entries, last = b"", [], _START
        *lines, tail = content[len(known) :].split(b"\n")
        entries = list(entries)
        for number, line in enumerate(lines, len(entries) + 1):
            entry = _whole(line)
            if entry is None or entry["before"] != last:
                raise self.damaged(number)
            entries.append(entry)
            last = entry["sha256"]
        self._checked = (content[: len(content) - len(tail)], list(entries), last)
        entry = _whole(tail)
        if entry is not None and entry["before"] == last:
            entries.append(entry)
        return entries

    def append(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``entry`` as the next line and return it with its hashes, once the line is on the disk.

        Only the last line is checked: it is all that the next one hangs on. Raises :class:`ValueError` for an entry
        with a key of :data:`CHAIN`, which would make its line one that was changed.
        """
        if taken := [key for key in CHAIN if key in entry]:
            raise ValueError(f"an entry of a journal cannot hold `{taken[0]}`")
        try:
            with locked(self.path, durable=self._durable) as file:
                size = os.fstat(file).st_size
                end, last = self._end(file, size)
                chained, line = _line(entry, last)
                if end < size:
                    os.ftruncate(file, end)
                _write(file, end, line)
                if self._durable:
                    os.fsync(file)
                    if end == 0:
                        # Whoever made these folders may have died before they were on the disk.
                        sync_folders(self.path.parent, self.path.parent.parent)
        except OSError as error:
            raise self.cannot_write(error) from None
        return chained

    def damaged(self, line: int, text: str = "was changed or lost") -> DamagedError:
        return DamagedError(self.path, line, f"{text}; {self._damage}")

    def cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: the {self._name} cannot be written, so {self._stop}: {error.strerror or error}")

    def _end(self, file: int, size: int) -> tuple[int, str]:
        """The offset where whole lines end, and the hash that the next line must carry."""
        start, block = size, _BLOCK
        while True:
            start = max(0, size - block)
            # Unless it is the file's first, the first line in the block is only the end of one.
            *lines, tail = _read(file, start, size).split(b"\n")
            if start == 0 or len(lines) > 1:
                break
            block *= 4
        last = _START
        if lines:
            entry = _whole(lines[-1])
            if entry is None:
                raise self.damaged(_lines_before(file, size - len(tail)))
            last = entry["sha256"]
        entry = _whole(tail)
        if entry is not None and entry["before"] == last:
            return size, entry["sha256"]
        return size - len(tail), last


@contextmanager
def locked(path: Path, *, durable: bool = True) -> Iterator[int]:
    """The file at ``path``, created where needed, with nobody else in it.

    ``durable``: the folders that changed by it are on the disk at the end.
    """
    changed: list[Path] = []
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        file, changed = _created(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        if durable:
            sync_folders(*changed)
    finally:
        os.close(file)


def _created(path: Path) -> tuple[int, list[Path]]:
    """The file at ``path``, open, and the folders that changed by its making."""
    changed, folder = [path.parent], path.parent
    while not folder.exists():
        folder = folder.parent
        changed.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600), changed


def sync_folders(*folders: Path) -> None:
    """Make what was created or renamed in ``folders`` survive a loss of power."""
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _line(entry: Mapping[str, Any], before: str) -> tuple[dict[str, Any], bytes]:
    """``entry`` chained to the line before, and with its own hash; and that as a line."""
    chained = {**entry, "before": before}
    text = json.dumps(chained, sort_keys=True, allow_nan=False)
    chained["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return chained, json.dumps(chained, sort_keys=True).encode()


def _whole(line: bytes) -> dict[str, Any] | None:
    """The entry in ``line`` with its hashes, or None when the line is not whole or not the one written."""
    try:
        entry = json.loads(line)
        content = {key: value for key, value in entry.items() if key not in CHAIN}
        return entry if line == _line(content, entry["before"])[1] else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read(file: int, start: int, end: int) -> bytes:
    content = bytearray()
    while start + len(content) < end:
        chunk = os.pread(file, end - start - len(content), start + len(content))
        if not chunk:
            break
        content += chunk
    return bytes(content)


def _lines_before(file: int, end: int) -> int:
    return _read(file, 0, end).count(b"\n")


def _write(file: int, end: int, line: bytes) -> None:
    """Write ``line`` at ``end``, on a line of its own."""
    starts_line = end == 0 or os.pread(file, 1, end - 1) == b"\n"
    rest = memoryview((b"" if starts_line else b"\n") + line + b"\n")
    os.lseek(file, end, os.SEEK_SET)
    while rest:
        rest = rest[os.write(file, rest) :]
