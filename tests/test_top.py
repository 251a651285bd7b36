"""`fedgraft top`, and the endpoint and the log of a run, as a person uses them."""

from __future__ import annotations

import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.processes import free_port
from fedgraft.server.watching.snapshot import RunReader

TEXT = 'name = "oncology"\n[server]\naddress = "127.0.0.1:9"\nlisten = "127.0.0.1"\n[[site]]\nname = "east"\n'


@pytest.fixture(autouse=True)
def _site_log() -> Iterator[None]:
    """The command silences the sites' log for its process, which here is that of all tests."""
    log, flwr = logging.getLogger("fedgraft.site"), logging.getLogger("flwr")
    before = log.propagate, list(log.handlers), flwr.level
    yield
    log.propagate, log.handlers[:] = before[:2]
    flwr.setLevel(before[2])


def typed(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fedgraft", "top", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def test_each_folder_has_its_page(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / "run")
    (tmp_path / "federation.toml").write_text(TEXT)
    kits = Authority.create(tmp_path / "federation.toml", tmp_path / "kits").kits
    for arguments, words in (
        ((tmp_path / "run",), ("tiny  finished  round 1 of 1", "east", "of 2")),
        ((tmp_path / "nowhere",), (f"{tmp_path}/nowhere:", "no run here yet")),
        (("--kit", kits / "server"), ("oncology  server does not answer", "is it started?", "no job yet")),
        (("--kit", kits / "sites" / "east"), ("east of oncology  no worker", "nothing was asked yet")),
    ):
        code, said = typed(*arguments, "--once", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0
        assert all(word in said.replace("\n", "") for word in words), said


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "fedgraft", "top", "later", "--seconds", "0.2"]
    # What runs in the background of a script ignores Ctrl-C, and hands that on.
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=heeding
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 120
    try:
        while b"no run here yet" not in said:
            assert time.monotonic() < deadline, said
            said += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the terminal's other end is closed
                break
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in said and b"Error" not in said


def test_a_simulation_can_be_scraped_and_logs_json_while_it_runs(tiny_federation: Any, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_federation.values(rounds=400)))
    port = free_port()
    command = [sys.executable, "-m", "fedgraft", "simulate", "tiny.json", "--output", "run", "--log-format", "json"]
    command += ["--engine", "inprocess", "--metrics-port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        while not said or (said[-1]["event"], said[-1].get("round")) != ("phase_finished", 2):
            said.append(json.loads(process.stderr.readline()))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            found = answer.read().decode()
    finally:
        process.kill()
        process.wait()
    assert 'fedgraft_run_status{status="running"} 1.0' in found and "fedgraft_rounds 400.0" in found
    phases = [(line["kind"], line["round"]) for line in said if line["event"] == "phase_started"]
    assert phases[:3] == [("evaluate", 0), ("train", 1), ("evaluate", 1)]
    assert all(datetime.fromisoformat(line["time"]).utcoffset() is not None for line in said)
    assert {line["run"] for line in said if line["logger"] == "fedgraft.run"} == {
        json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    }
    # Its process was killed, which a page says.
    assert RunReader(tmp_path / "run").look().status == "stopped"
