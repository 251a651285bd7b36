"""Flower's processes: what they see, why they ended, and that they end."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from fedgraft.core.errors import UserError
from fedgraft.deployment.processes import (
    Stopped,
    end,
    ended_on_signals,
    environment,
    free_port,
    last_words,
    launch,
    require_free,
)


def test_flower_sees_its_own_home_and_sends_no_word_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_OIDC_ENABLED", "1")
    monkeypatch.setenv("NO_PROXY", "intranet")
    found = environment(tmp_path, MORE="1")
    assert {key: value for key, value in found.items() if key.startswith("FLWR_")} == {
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    assert found["NO_PROXY"] == "intranet,127.0.0.1,localhost,::1" and found["MORE"] == "1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ("one\n\x1b[93mWARNING \x1b[0m:   retrying\n\n", "retrying"),
        (
            "\x1b[91mERROR \x1b[0m:     Exit Code: 305\nFailed.\nNo connection.\n\nSee <https://x>\nINFO:  Finished\n",
            "Failed. No connection.",
        ),
        ("ERROR : Exit Code: 604\nNo file.", "No file."),
    ],
)
def test_why_a_process_ended_is_read_from_its_log(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text(f"ERROR : Exit Code: 1\nAn older one.\n\n{text}")
    assert last_words(log, len("ERROR : Exit Code: 1\nAn older one.\n\n")) == reason


def test_a_port_is_free_or_not() -> None:
    port = free_port()
    require_free("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
            require_free("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen at 203.0.113.1:9092"):
        require_free("203.0.113.1", 9092)


def test_a_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    process = launch(["sh", "-c", "sleep 60 & echo started; wait"], environment(tmp_path), log)
    while "started" not in log.read_text():
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1 and log.stat().st_mode & 0o777 == 0o600
    end(process)
    psutil.wait_procs(children, timeout=5)
    assert process.returncode == -signal.SIGTERM and not children[0].is_running()
    end(process)
    with pytest.raises(UserError, match="no-such-command: cannot be started"):
        launch(["no-such-command"], environment(tmp_path), log)


def test_a_request_to_end_leaves_the_block_and_puts_the_handler_back() -> None:
    before, reached = signal.getsignal(signal.SIGTERM), []
    with ended_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        reached.append("after it")
    with ended_on_signals():
        raise KeyboardInterrupt
    with ended_on_signals():
        raise Stopped
    with pytest.raises(UserError), ended_on_signals():
        raise UserError("passes through")
    assert reached == [] and signal.getsignal(signal.SIGTERM) is before
