"""An account of every decision, kept by who decides: lines that hang together by their hashes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .journal import Journal

#: Its name in the folder of a site, or of a server's state.
FILE = "audit.jsonl"


def audit_journal(path: Path, *, durable: bool = True) -> Journal:
    """The journal that an audit log is."""
    return Journal(
        path,
        name="audit log",
        stop="nothing leaves",
        damage="nothing leaves until somebody has seen to it: move the file away, and a new one is begun",
        durable=durable,
    )


class AuditLog:
    """``audit.jsonl`` in ``folder``; ``None`` keeps none (for tests)."""

    def __init__(self, folder: Path | None, *, durable: bool = True) -> None:
        self._journal = audit_journal(folder / FILE, durable=durable) if folder is not None else None

    def write(self, event: str, **values: Any) -> None:
        """Add a line, which is there before this returns. Raises :class:`UserError` when that cannot be."""
        if self._journal is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._journal.append({"time": time, "event": event, **values})
