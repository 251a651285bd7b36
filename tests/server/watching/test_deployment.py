"""The server of a kit as its page, its metrics and its commands see it."""

from __future__ import annotations

import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgraft import cli
from fedgraft.core.errors import UserError
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import ServerKit
from fedgraft.deployment.processes import free_port
from fedgraft.privacy.auditlog import AuditLog
from fedgraft.server.deployed import serving
from fedgraft.server.deployed.control import Node, Run
from fedgraft.server.watching import deployment
from fedgraft.server.watching.deployment import KitReader, KitView
from fedgraft.server.watching.page import kit_page

TEXT = 'name = "oncology"\n[server]\naddress = "127.0.0.1:9"\nlisten = "127.0.0.1"\n[[site]]\nname = "east"\n'
JOB = Run(7, "first", "running", "", "2026-11-23T12:00:00+00:00", "")


class Server:
    """What the control interface says, in place of a SuperLink's."""

    def __init__(self) -> None:
        self.trouble = ""
        self.nodes_ = [Node(1, "east", "", "online"), Node(2, "north", "", "offline")]
        self.runs_: list[Run] = []

    def nodes(self) -> list[Node]:
        if self.trouble:
            raise UserError(self.trouble)
        return self.nodes_

    def runs(self) -> list[Run]:
        return self.runs_

    def close(self) -> None:
        return


@pytest.fixture
def kit(tmp_path: Path) -> ServerKit:
    (tmp_path / "federation.toml").write_text(TEXT)
    return ServerKit.open(Authority.create(tmp_path / "federation.toml", tmp_path / "kits").kits / "server")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server()
    monkeypatch.setattr(deployment, "Control", lambda kit: found)
    return found


def printed(view: KitView) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(kit_page(view))
    return capture.get()


def test_a_job_is_seen_from_its_submission_to_its_end(
    kit: ServerKit, server: Server, tiny_federation: Any, tmp_path: Path
) -> None:
    reader = KitReader(kit)
    view = reader.look()
    assert (view.sites, view.trouble, view.job) == ({"east": True, "north": False}, "", None)
    assert "1 of 2 sites online: east" in printed(view) and "no job yet" in printed(view)
    server.runs_ = [JOB, replace(JOB, id=8, name="second", status="pending")]
    view = reader.look()
    assert view.job is not None and (view.job.name, view.job.status) == ("second", "pending")
    tiny_federation.run(tiny_federation.config(rounds=1), kit.runs / "second")
    view = reader.look()
    assert view.job is not None and (view.job.status, view.job.round) == ("finished", 1)
    assert {site.name: site.connected for site in view.job.sites} == {"east": True, "north": False, "south": False}
    text = printed(view)
    assert "second  finished  round 1 of 1" in text
    assert [line.split()[:2] for line in text.splitlines()[-3:]] == [
        ["east", "online"],
        ["north", "offline"],
        ["south", "offline"],
    ]


def test_a_job_that_ended_before_it_wrote_anything_says_why(kit: ServerKit, server: Server) -> None:
    server.runs_ = [replace(JOB, status="failed", details="the app crashed")]
    text = printed(KitReader(kit).look())
    assert "first  failed" in text and "the app crashed" in text


def test_what_the_files_say_is_shown_while_the_server_is_away(
    kit: ServerKit, server: Server, tiny_federation: Any
) -> None:
    for name in ("first", "second"):
        tiny_federation.run(tiny_federation.config(rounds=1, name=name), kit.runs / name)
    server.trouble = "the server does not answer"
    view = KitReader(kit).look()
    assert (view.trouble, view.sites) == ("the server does not answer", {})
    assert view.job is not None and view.job.name == "second"
    assert all(site.connected is None for site in view.job.sites)
    assert "does not answer" in printed(view) and "offline" not in printed(view)


def test_whom_the_server_turned_away_is_on_the_page(kit: ServerKit, server: Server) -> None:
    log = AuditLog(kit.state)
    for why in ("its key is not known here", "only processes on this machine may", "its key is not known here"):
        log.write("refused", why=why, address="10.0.0.9", path="/v1/fleet/x")
    log.write("registered", site="east", key="ab")
    view = KitReader(kit).look()
    assert view.refused == {"its key is not known here": 2, "only processes on this machine may": 1}
    text = printed(view)
    assert "refused 2: its key is not known here" in text and "ago, from 10.0.0.9" in text


def test_server_start_serves_metrics_and_says_its_lines(
    kit: ServerKit, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prometheus_client")
    port, scraped = free_port(), []
    AuditLog(kit.state).write("refused", why="its key is not known here", address="10.0.0.9", path="/")

    def serve(kit: ServerKit, say: Any) -> None:
        say("serving oncology")
        scraped.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode())

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setenv("FEDGRAFT_LOG_FORMAT", "text")
    command = ["fedgraft", "server", "start", "--kit", str(kit.folder), "--metrics-port", str(port)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and capsys.readouterr().out == "serving oncology\n"
    assert 'fedgraft_site_up{site="north"} 0.0' in scraped[0] and "fedgraft_server_up 1.0" in scraped[0]
    assert 'fedgraft_server_refusals_total{reason="its key is not known here"} 1.0' in scraped[0]
