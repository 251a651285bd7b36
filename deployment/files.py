"""Files that others must not read: written with their mode from the first byte, and refused where it is too wide."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..core.errors import UserError

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
PUBLIC_FILE = 0o644


def private_folder(path: Path) -> Path:
    """The folder ``path`` with mode 0700, made where it is missing. Raises :class:`UserError`."""
    try:
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        path.chmod(PRIVATE_FOLDER)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder: {error.strerror or error}") from None
    return path


def write(path: Path, content: str | bytes, mode: int = PUBLIC_FILE) -> None:
    """Replace ``path`` by ``content`` at once; no other mode than ``mode`` ever holds it. Raises :class:`UserError`."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(handle)
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def read(path: Path, what: str, mend: str) -> bytes:
    """What ``path`` holds. Raises :class:`UserError` that calls it ``what`` and says ``mend`` where it is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: {what} is missing; {mend}") from None
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read: {error.strerror or error}") from None


def require_private(*paths: Path) -> None:
    """Raise :class:`UserError` for the first of ``paths`` that others than its owner may use."""
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if mode & 0o077:
            wanted = PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE
            raise UserError(f"{path}: others may use it (mode {mode:04o}); run: chmod {wanted:o} {path}")
