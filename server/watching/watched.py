"""All that looks at a run from its server: the note of what it is at, the log, and traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...core.errors import UserError, one_line
from ...core.progress import Watch
from .journal import Logged
from .progress import Noted
from .spans import Traced


@contextmanager
def watched(folder: Path, watch: Watch) -> Iterator[Watch]:
    """What the run in ``folder`` is to tell its events to; it passes them on to ``watch``."""
    noted = Noted(watch, folder)
    logged = Logged(noted, folder)
    traced = Traced(logged, folder)
    try:
        yield traced
    except BaseException as error:
        why = one_line(error) if isinstance(error, UserError) else type(error).__name__
        logged.ended(why)
        traced.ended(why)
        raise
    else:
        logged.ended()
        traced.ended()
    finally:
        noted.close()
