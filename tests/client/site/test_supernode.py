"""What a site's SuperNode is started with, and what keeps it from being started."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supernode.cli.flower_supernode import _parse_supernode_lifespan_config

from fedgraft.client.site import leaving, supernode
from fedgraft.client.site.keys import make_key
from fedgraft.client.site.trust import write_roster
from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit
from fedgraft.deployment.reach import reach
from fedgraft.privacy import Ledger
from fedgraft.privacy.accounting import Event
from fedgraft.privacy.auditlog import AuditLog, audit_journal
from fedgraft.privacy.securesum.identity import load_roster, load_signing_key, sign

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "federation.toml").write_text(TEXT)
    found = Authority.create(tmp_path / "federation.toml", tmp_path / "kits of x")
    make_key(found.kits / "sites" / "east")
    found.sign(found.kits / "sites" / "east" / "site.csr")
    return found


@pytest.fixture
def kit(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> SiteKit:
    monkeypatch.setattr(supernode, "reach", lambda host, port, authority: 0.0)
    return SiteKit.open(authority.kits / "sites" / "east")


def test_flower_reads_the_command_as_it_is_meant(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = kit.folder / "secret"
    secret.write_bytes(b"known to both")
    command = supernode.supernode_command(kit, 18101, secret)
    monkeypatch.setattr("sys.argv", ["flower-supernode", *command[3:]])
    config = _parse_supernode_lifespan_config()
    assert (config.insecure, config.server_address, config.port) == (False, "127.0.0.1:9092", 18101)
    assert (config.isolation, config.superexec_auth_secret) == ("process", b"known to both"), "it runs nothing itself"
    assert config.root_certificates == (kit.folder / "ca.crt").read_bytes()
    assert config.authentication_keys is not None
    assert not config.runtime_dependency_install
    assert config.node_config == {
        "site": "east",
        "site-folder": str(kit.state),
        "policy": str(kit.policy),
        "signing-key": str(kit.key),
    }
    assert " " in str(kit.folder), "blanks are passed on"


def test_a_secure_sum_knows_the_members_of_the_roster_and_signs_with_the_sites_key(
    kit: SiteKit, authority: Authority
) -> None:
    roster = load_roster(write_roster(kit))
    key = load_signing_key(kit.key)
    assert roster.owns("east", key) and roster.signed("east", sign(key, b"text"), b"text")
    with pytest.raises(UserError, match="site west is not in this site's roster"):
        roster.digest(["east", "west"])
    authority.revoke("east")
    assert not load_roster(write_roster(kit)).owns("east", key)


def test_a_path_that_flower_would_misread_is_refused(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / 'a "kit"'
    (authority.kits / "sites" / "east").rename(folder)
    with pytest.raises(UserError, match="Flower takes no quotes or backslashes"):
        supernode.node_config(SiteKit.open(folder))


def test_a_site_that_is_ready_is_let_through_and_one_that_is_not_starts_nothing(
    kit: SiteKit, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(supernode, "launch", lambda *a: started.append(a))
    supernode.require_ready(kit)
    monkeypatch.setattr(supernode, "reach", lambda host, port, authority: 3600.0)
    with pytest.raises(UserError, match=r"this machine's clock is 3600 s behind that of 127.0.0.1:9092"):
        supernode.start(kit, print)
    kit.policy.write_text("nonsense")
    with pytest.raises(UserError, match=r"policy.toml"):
        supernode.start(kit, print)
    authority.revoke("east")
    with pytest.raises(UserError, match="does not list this site's key"):
        supernode.start(kit, print)
    kit.key.chmod(0o666)
    with pytest.raises(UserError, match="chmod 600"):
        supernode.start(kit, print)
    assert started == []
    log = audit_journal(kit.state / "audit.jsonl").entries()
    assert [(line["event"], line["site"], line["kind"]) for line in log] == [("refused", "east", "start")] * 4
    for line, why in zip(log, ("clock is 3600 s behind", "policy.toml", "does not list", "chmod 600"), strict=True):
        assert why in line["why"] and "\n" not in line["why"]


@pytest.mark.parametrize(
    ("flower", "said"),
    [
        ("Failed to activate SuperNode: 401 Unauthorized", "does not know this site's key: not signed yet"),
        ("SuperNode terminated gracefully", "takes this site's key no more: revoked or expired"),
    ],
)
def test_a_site_that_the_server_turns_away_says_so_in_one_line_and_in_its_audit_log(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch, flower: str, said: str
) -> None:
    monkeypatch.setattr(supernode, "supernode_command", lambda *a: [sys.executable, "-c", f"print({flower!r})"])
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(supernode, "worker_command", lambda *a: waits)
    with pytest.raises(UserError, match=said) as refused:
        supernode.start(kit, print)
    (line,) = audit_journal(kit.state / "audit.jsonl").entries()
    assert (line["event"], line["kind"], line["why"]) == ("refused", "start", str(refused.value))


def test_a_site_whose_certificate_has_ended_starts_nothing_and_writes_it_down(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "launch", None)
    at = certificates.now() + timedelta(days=366)
    monkeypatch.setattr(certificates, "now", lambda: at)
    with pytest.raises(UserError, match=r"site.crt: expired on .*; run fedgraft site init --new-key"):
        supernode.start(kit, print)
    (line,) = audit_journal(kit.state / "audit.jsonl").entries()
    assert line["event"] == "refused" and "site.crt: expired on" in line["why"]


def test_a_site_whose_ledgers_were_lost_or_put_back_from_a_copy_does_not_take_part(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "launch", None)
    ledger = Ledger(kit.state / "ledgers", "ab" * 32, dataset="letters")
    first = ledger.reserve(Event(1.0, 0.1, 3), split="s").line
    (file,) = (kit.state / "ledgers").glob("*.jsonl")
    copy = file.read_bytes()
    second = ledger.reserve(Event(1.0, 0.1, 3), split="s").line
    for line in (first, second):
        AuditLog(kit.state).write("left", kind="train", privacy={"ledger": line})
    supernode.require_ready(kit)
    file.write_bytes(copy)
    with pytest.raises(UserError, match=r"audit.jsonl: line 2 says that an answer left .* more was spent than it says"):
        supernode.start(kit, print)
    file.unlink()
    with pytest.raises(UserError, match=r"audit.jsonl: line 1 says that an answer left"):
        supernode.start(kit, print)
    assert [line["event"] for line in audit_journal(kit.state / "audit.jsonl").entries()] == [
        *["left"] * 2,
        *["refused"] * 2,
    ]


def test_a_server_without_tls_hears_the_beginning_of_tls_and_nothing_of_the_site(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    heard.append(connection.recv(1 << 16))

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        monkeypatch.setattr(supernode, "reach", lambda host, _, authority: reach("127.0.0.1", port, authority))
        monkeypatch.setattr(supernode, "launch", None)
        with pytest.raises(UserError, match="speaks no TLS, so nothing is sent there"):
            supernode.start(kit, print)
        thread.join()
    assert heard[0][:2] == b"\x16\x03" and all(sent[:1] in (b"", b"\x15") for sent in heard[1:]), "TLS and its alert"
    assert not any(word in sent for sent in heard for word in (b"HTTP", b"GET", b"east"))
    (line,) = audit_journal(kit.state / "audit.jsonl").entries()
    assert line["event"] == "refused" and "speaks no TLS" in line["why"]


def _fake(folder: Path, name: str, *, deaths: int, words: str = "") -> list[str]:
    """A process that dies by SIGKILL the first few times and then stays; counts its starts in ``folder``."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"starts = pathlib.Path({str(folder / name)!r})\n"
        "starts.open('a').write('x')\n"
        f"print({words!r}, flush=True)\n"
        f"if len(starts.read_text()) <= {deaths}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def fakes(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Starts a site of fake processes, each of which dies so often; SIGTERM comes once both are up for good.

    Returns what was said, the pauses, and the numbers of the SuperNodes that the server was told of.
    """

    def run(*, worker: int = 0, node: int = 0, words: str = "", reached: bool = True) -> Any:
        said: list[str] = []
        pauses: list[float] = []
        left: list[int] = []
        for name, times, text in (("worker", worker, words), ("supernode", node, "SuperNode ID: 77")):
            command = _fake(kit.folder, name, deaths=times, words=text)
            monkeypatch.setattr(supernode, f"{name}_command", lambda *a, command=command: command)

        def pause(seconds: float) -> None:
            if seconds != supernode._POLL:
                pauses.append(seconds)
                return
            starts = {name: kit.folder / name for name in ("worker", "supernode")}
            wanted = {"worker": worker + 1, "supernode": node + 1}
            if all(path.exists() and len(path.read_text()) == wanted[name] for name, path in starts.items()):
                signal.raise_signal(signal.SIGTERM)
            time.sleep(0.02)

        def leave(kit: SiteKit, number: int) -> bool:
            left.append(number)
            return reached

        monkeypatch.setattr(leaving, "leave", leave)
        monkeypatch.setattr(supernode, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
        supernode.start(kit, said.append)
        return said, pauses, left

    return run


def test_a_worker_that_dies_is_started_again_after_a_growing_pause(fakes: Callable[..., Any], kit: SiteKit) -> None:
    said, pauses, left = fakes(worker=3, words="its last words")
    log = kit.folder / "logs" / "worker.log"
    again = f"the site's worker ended with code -9: its last words (log: {log}); it is started again"
    assert said[1:] == [again] * 3
    assert pauses == [2, 4, 6] and left == []
    assert not (kit.state / "audit.jsonl").exists(), "nothing was refused"


def test_a_supernode_that_dies_is_started_again_once_the_server_lets_go_of_it(fakes: Callable[..., Any]) -> None:
    said, pauses, left = fakes(node=2)
    assert [line.split(" (log")[0] for line in said[1:]] == ["the SuperNode ended with code -9: SuperNode ID: 77"] * 2
    assert pauses == [2, 4] and left == [77, 77]


def test_a_supernode_that_dies_while_the_server_is_away_waits_until_it_is_forgotten(fakes: Callable[..., Any]) -> None:
    _, pauses, left = fakes(node=1, reached=False)
    assert pauses == [62] and left == [77]


def test_processes_that_do_not_stay_up_end_the_site_with_one_line(fakes: Callable[..., Any], kit: SiteKit) -> None:
    with pytest.raises(UserError, match=r"ended with code -9 .*; the site's processes died 6 times in 10 minutes$"):
        fakes(worker=9)
    assert (kit.folder / "worker").read_text() == "x" * 6
    (line,) = audit_journal(kit.state / "audit.jsonl").entries()
    assert line["event"] == "refused" and "died 6 times" in line["why"]


def test_deaths_that_lie_long_ago_are_not_counted(fakes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_WITHIN", 0.0)
    said, _, _ = fakes(worker=7)
    assert len(said) == 8


def test_a_worker_that_says_why_it_ends_is_not_started_again(fakes: Callable[..., Any], kit: SiteKit) -> None:
    with pytest.raises(UserError, match=r"the site's worker ended with code -9: fedgraft: another worker .* serves"):
        fakes(worker=1, words="fedgraft: another worker (process 9) serves this site")
    assert (kit.folder / "worker").read_text() == "x"
