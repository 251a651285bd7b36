"""Logs as lines of JSON: fixed words and named values, and never the text of an exception or of a library.

A message that was put together from whatever was at hand may quote a record. So only what code of fedgraft has named
as an event with its values is written; of anything else the line says where in the code it came from.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

#: By which the processes that a command starts know of its choice.
ENVIRONMENT = "FEDGRAFT_LOG_FORMAT"
_OWN = "fedgraft"
_EVENT, _VALUES = "fedgraft_event", "fedgraft_values"


class LogFormat(StrEnum):
    """What a command says while it runs."""

    text = "text"
    json = "json"


def choose(form: LogFormat, stream: TextIO) -> bool:
    """Take the form for this process, on ``stream``, and all that it starts; returns whether it is JSON."""
    os.environ[ENVIRONMENT] = form.value
    return begin(stream)


def begin(stream: TextIO) -> bool:
    """Write lines of JSON to ``stream`` where the environment asks for them; returns whether it does."""
    if os.environ.get(ENVIRONMENT) != LogFormat.json:
        return False
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    # Flower lets all that it says pass.
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] == _OWN)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OWN).setLevel(logging.INFO)
    return True


def event(room: str, name: str, *, level: int = logging.INFO, **values: Any) -> None:
    """Log that ``name`` has happened in ``room``; ``values`` hold no record, no text of a record, no data's path."""
    log = logging.getLogger(f"{_OWN}.{room}")
    if log.isEnabledFor(level):
        log.log(level, name, extra={_EVENT: name, _VALUES: values}, stacklevel=2)


def speaker(room: str, form: LogFormat) -> Callable[[str], None]:
    """What says a line to the person at the command, in the form they chose."""
    if choose(form, sys.stdout):
        return lambda line: event(room, "said", text=line)
    return lambda line: print(line, flush=True)


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, event, and the values of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of ``record``, without its message unless that is an event's name."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, _EVENT, "message"),
        }
        if not hasattr(record, _EVENT):
            line["where"] = f"{record.module}:{record.lineno}"
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        for key, value in getattr(record, _VALUES, {}).items():
            line.setdefault(key, value)
        return json.dumps(line, default=str)
