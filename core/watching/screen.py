"""A page in the terminal that is drawn anew until Ctrl-C, and the small pictures on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_FULL, _EMPTY = "█", "░"
#: Columns of a page that goes into a file or a pipe, where there is no terminal to ask.
WIDTH = 80


def show(draw: Callable[[], RenderableType], *, once: bool, seconds: float) -> None:
    """Print ``draw()`` once, or show it anew every ``seconds`` until Ctrl-C."""
    console = Console()
    if once or not console.is_terminal:
        (console if console.is_terminal else Console(width=WIDTH)).print(draw())
        return
    with suppress(KeyboardInterrupt), Live(draw(), console=console, auto_refresh=False, screen=True) as screen:
        while True:
            time.sleep(seconds)
            screen.update(draw(), refresh=True)


def plain(text: object, most: int = 200) -> str:
    """``text`` as a terminal may be shown it: what came from the other end of the wire holds no control character."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last ``width`` values as blocks between their least and their largest."""
    values = values[-width:]
    if not values:
        return ""
    least, span = min(values), max(values) - min(values)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(top * (value - least) / span) if span else top // 2] for value in values)


def bar(part: float, width: int = 10) -> Text:
    """``part`` (0 to 1) of a bar that is ``width`` wide; red where little is left."""
    full = round(min(1.0, max(0.0, part)) * width)
    style = "red" if part >= 0.9 else "yellow" if part >= 0.7 else "green"
    return Text.assemble((_FULL * full, style), (_EMPTY * (width - full), "dim"))


def age(then: datetime | None, now: datetime | None = None) -> str:
    """How long ago ``then`` was: ``12 s``, ``3 min``, ``2 h``, ``5 d``; a dash for never."""
    if then is None:
        return "–"
    seconds = max(0.0, ((now or datetime.now(UTC)) - then).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """``0:01:12``."""
    return str(timedelta(seconds=int(seconds)))


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def moment(text: object) -> datetime | None:
    """The time that an ISO 8601 ``text`` with its zone says, None for what says none."""
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None
