"""What a site logs as JSON: each instruction, and nothing of a record, whatever goes wrong."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgraft.client import holdings
from fedgraft.core.watching import logs

SECRET = "pt-0007-xj"


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    loggers = [logging.getLogger(name) for name in (None, "fedgraft", "fedgraft.site")]
    before = [(log.level, list(log.handlers), log.propagate) for log in loggers]
    monkeypatch.setenv(logs.ENVIRONMENT, "json")
    said = io.StringIO()
    loggers[0].handlers[:] = []
    loggers[2].propagate = True
    assert logs.begin(said)
    yield said
    for log, (level, handlers, propagate) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.handlers[:] = handlers
        log.propagate = propagate


def lines(stream: io.StringIO, event: str) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in stream.getvalue().splitlines()]
    return [line for line in found if line["event"] == event]


def test_each_instruction_is_logged_without_what_the_people_of_the_site_count(
    conversation: ModuleType, tiny_federation: Any, tmp_path: Path, stream: io.StringIO
) -> None:
    config = tiny_federation.private(**{"privacy.noise_multiplier": 2.0})
    site = conversation.Conversation(config, tmp_path / "north")
    site.hello()
    site.train(1)
    said = lines(stream, "left")
    assert [(line["kind"], line["round"], line["run"], line["site"]) for line in said] == [
        ("hello", 1, "r", "north"),
        ("train", 1, "r", "north"),
    ]
    assert all(line["logger"] == "fedgraft.audit" and line["seconds"] >= 0 and line["bytes"] > 0 for line in said)
    known = {"time", "level", "logger", "event", "site", "kind", "run", "round", "job", "bytes", "seconds"}
    assert all(set(line) == known for line in said)
    audit = [json.loads(text) for text in (tmp_path / "north" / "audit.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in audit if line["event"] == "left"] == [line["seconds"] for line in said]


def a_label_that_is_none(tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in which a label holds what a patient's record says."""
    table = tmp_path / "records.csv"
    first, *rest = tiny_federation.table.read_text().splitlines()
    text, _, patient = rest[0].split(",")
    table.write_text("\n".join([first, f"{text},{SECRET},{patient}", *rest[1:]]) + "\n")
    return table


def a_crash_that_quotes_a_cell(tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that fails over a cell, and says which."""

    def encode(*_: Any) -> Any:
        raise ValueError(f"could not convert string to float: '{SECRET}'")

    monkeypatch.setattr(holdings, "encode", encode)
    return tiny_federation.table


@pytest.mark.parametrize(
    ("broken", "why"), [(a_label_that_is_none, "PrivateError"), (a_crash_that_quotes_a_cell, "ValueError")]
)
def test_a_refusal_over_bad_data_says_nothing_of_them(
    conversation: ModuleType,
    tiny_federation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: io.StringIO,
    broken: Callable[..., Path],
    why: str,
) -> None:
    table = broken(tiny_federation, tmp_path, monkeypatch)
    config = tiny_federation.private(**{"data.path": str(table)})
    site = conversation.Conversation(config, tmp_path / "north", **{"data-path": str(table)})
    logging.getLogger().addHandler(caplog.handler)
    assert site.hello().error
    # The secret did come by: a log of the usual kind would hold it.
    assert SECRET in caplog.text
    assert SECRET not in stream.getvalue() and str(table) not in stream.getvalue()
    (refused,) = lines(stream, "refused")
    assert (refused["why"], refused["kind"], refused["site"]) == (why, "hello", "north")
    (message,) = lines(stream, "message")
    assert message["logger"] == "fedgraft.site" and message["where"].startswith("answering:")
