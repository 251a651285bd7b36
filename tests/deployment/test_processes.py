"""Flower's processes: what they see, why they ended, and that they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
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


def test_a_process_ends_with_the_one_that_started_it_however_that_ends(tmp_path: Path) -> None:
    child = (
        "import os, time; from fedgraft.deployment.processes import leave_with_parent; "
        "leave_with_parent(lambda: os._exit(1)); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, sys, time; from pathlib import Path; "
        "from fedgraft.deployment.processes import PARENT, environment, launch; "
        f"found = launch([sys.executable, '-c', {child!r}], environment(Path({str(tmp_path)!r}), "
        f"**{{PARENT: str(os.getpid())}}), Path({str(tmp_path / 'log')!r})); "
        "print(found.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = psutil.Process(int(process.stdout.readline()))
        deadline = time.monotonic() + 20
        while "up" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and found.is_running()
            time.sleep(0.05)
        time.sleep(0.5)
        assert found.is_running(), "its parent is there"
        process.kill()
    found.wait(10)
    assert not found.is_running()
