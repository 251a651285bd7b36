"""All that looks at a run from its server: the note of what it is at, the log, and traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...core.errors import UserError
from ...core.progress import Watch
from .journal import Logged
from .progress import Noted


@contextmanager
def watched(folder: Path, watch: Watch) -> Iterator[Watch]:
    """What the run in ``folder`` is to tell its events to; it passes them on to ``watch``."""
    noted = Noted(watch, folder)
    logged = Logged(noted, folder)
    try:
        yield logged
        logged.ended(None)
    except UserError as error:
        logged.ended(error)
        raise
    finally:
        noted.close()
