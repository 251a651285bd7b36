"""Files that are whole or not there: written beside their name, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..core.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` at once. Raises :class:`UserError` when the disk is full or read-only."""
    write_parts(path, [text])


def write_json(path: Path, value: Any) -> None:
    """The same for ``value`` as JSON, which is never in memory as a whole."""
    write_parts(path, chain(json.JSONEncoder(indent=2).iterencode(value), "\n"))


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """The same for a text that comes in parts."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace the folder ``path`` by what ``fill`` writes into an empty one, whole or not at all.

    Raises :class:`UserError` when the disk is full or read-only.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        fill(beside)
        for file in beside.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_folder(beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        sync_folder(path.parent)
    except UserError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError | SafetensorError) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written: {why}; free the disk or choose another --output")
