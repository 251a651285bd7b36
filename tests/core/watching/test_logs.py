"""Lines of JSON: what an event names is in them, and what anything else says is not."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from fedgraft.core.watching import logs


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged, as this process logs where JSON was chosen."""
    root, own = logging.getLogger(), logging.getLogger("fedgraft")
    handlers, levels = list(root.handlers), (root.level, own.level)
    monkeypatch.setenv(logs.ENVIRONMENT, "json")
    said = io.StringIO()
    for handler in handlers:
        root.removeHandler(handler)
    assert logs.begin(said)
    yield said
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(text) for text in stream.getvalue().splitlines()]


def test_an_event_has_its_values_and_a_time_in_utc(stream: io.StringIO) -> None:
    logs.event("run", "phase_finished", round=2, faults={"north": "late"}, seconds=1.5)
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "logger": "fedgraft.run",
        "event": "phase_finished",
        "round": 2,
        "faults": {"north": "late"},
        "seconds": 1.5,
    }


def test_a_value_takes_no_place_of_the_lines_own(stream: io.StringIO) -> None:
    logs.event("run", "note", level=logging.WARNING, time="never", logger="other", text="x")
    (line,) = lines(stream)
    assert (line["level"], line["logger"], line["text"]) == ("warning", "fedgraft.run", "x")
    assert line["time"] != "never"


def test_what_is_no_event_is_told_by_its_place_alone(stream: io.StringIO) -> None:
    secret = "pt-0007-xj"
    try:
        raise ValueError(f"could not convert {secret}")
    except ValueError as error:
        logging.getLogger("fedgraft.worker").error("site %s: %s", "north", error, exc_info=True)
        logging.getLogger("a.library").warning(f"bad row: {secret}")
        logging.getLogger("a.library").setLevel(logging.DEBUG)
        logging.getLogger("a.library").info("not even this")
        usual = logging.Formatter().format(
            logging.LogRecord("x", logging.ERROR, "f", 1, "%s", (error,), (type(error), error, error.__traceback__))
        )
    assert secret in usual and secret not in stream.getvalue()
    mine, theirs = lines(stream)
    assert (mine["event"], mine["error"], mine["level"]) == ("message", "ValueError", "error")
    assert mine["where"].startswith("test_logs:") and theirs["logger"] == "a.library"


def test_without_the_choice_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(logs.ENVIRONMENT, raising=False)
    before = list(logging.getLogger().handlers)
    said = io.StringIO()
    assert not logs.begin(said)
    logs.event("run", "phase_finished", round=1)
    logs.speaker("server", logs.LogFormat.text)("serving")
    assert logging.getLogger().handlers == before and said.getvalue() == ""
    assert capsys.readouterr() == ("serving\n", "")
