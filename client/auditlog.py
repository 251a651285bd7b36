"""The site's own account of every decision and of everything that left: lines that hang together by their hashes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.watching import logs
from ..privacy.journal import Journal

#: Its name in the site's folder.
FILE = "audit.jsonl"
#: What of a line the log is told too: no numbers about the people of the site.
_LOGGED = ("site", "kind", "run", "round", "job", "dataset", "why", "rule", "did", "code", "bytes", "seconds")


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
    """``audit.jsonl`` in the site's ``folder``; ``None`` keeps none (for tests)."""

    def __init__(self, folder: Path | None, *, durable: bool = True) -> None:
        self._journal = audit_journal(folder / FILE, durable=durable) if folder is not None else None

    def write(self, event: str, **values: Any) -> None:
        """Add a line, which is there before this returns. Raises :class:`UserError` when that cannot be."""
        if self._journal is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._journal.append({"time": time, "event": event, **values})
            logs.event("audit", event, **{key: values[key] for key in _LOGGED if key in values})
