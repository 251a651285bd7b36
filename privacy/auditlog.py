"""An account of every decision, kept by who decides: lines that hang together by their hashes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.watching import logs
from .journal import DamagedError, Journal
from .ledger import ledger_file

#: Its name in the folder of a site, or of a server's state.
FILE = "audit.jsonl"
#: The folder beside it in which a site's ledgers lie.
LEDGERS = "ledgers"
#: What of a line the log is told too: no numbers about the people of the site.
_LOGGED = (
    *("site", "kind", "run", "round", "job", "dataset", "why", "rule", "did", "code", "bytes", "seconds"),
    *("address", "path", "key", "until", "call", "status"),
)


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
            logs.event("audit", event, **{key: values[key] for key in _LOGGED if key in values})


def require_ledger_of_audit(folder: Path) -> None:
    """Raise :class:`DamagedError` when an answer left the site under a line that its ledgers hold no longer."""
    held = {entry["sha256"] for file in (folder / LEDGERS).glob("*.jsonl") for entry in ledger_file(file).entries()}
    path = folder / FILE
    for number, entry in enumerate(audit_journal(path).entries(), 1):
        under = (entry.get("privacy") or {}).get("ledger")
        if under and under not in held:
            raise DamagedError(
                path,
                number,
                f"says that an answer left under ledger line {under[:16]}, which {folder / LEDGERS} does not hold: "
                "a ledger was lost or put back from an old copy, and more was spent than it says; restore the newest",
            )
