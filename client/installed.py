"""What runs at the site: a hash of the installed files, for the site's policy to pin."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

#: What is code, or decides what code does. Compiled copies are made of it.
_KINDS = {".py", ".toml", ".txt"}


@lru_cache(maxsize=1)
def installed_digest() -> str:
    """SHA-256 over names and contents of the installed files, as they were when it was first asked for.

    A source checkout holds folders that are never installed (tests, documentation): without ``__init__.py`` they do
    not count. Raises :class:`OSError` for a file that cannot be read.
    """
    return digest_of(Path(__file__).resolve().parents[1])


def digest_of(root: Path) -> str:
    """The same for the package in the folder ``root``."""
    packages = [folder for folder in root.iterdir() if (folder / "__init__.py").is_file()]
    files = [*root.glob("*"), *(path for folder in packages for path in folder.rglob("*"))]
    whole = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files if path.suffix in _KINDS):
        if path.is_file() and ("/" in name or path.suffix == ".py"):
            content = path.read_bytes()
            whole.update(f"{name}|{len(content)}|".encode() + content)
    return whole.hexdigest()
