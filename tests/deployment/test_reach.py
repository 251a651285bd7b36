"""Reaching the server: every way in which it fails is told apart, before anything is sent."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.certificates import Signer
from fedgraft.deployment.reach import reach, require_clock


class _Health(BaseHTTPRequestHandler):
    ahead = timedelta()
    status = 200

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        self.send_header("Date", format_datetime(certificates.now() + self.ahead, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    key = certificates.new_key()
    made = Signer(key, certificates.authority("oncology", key, 3650))
    (tmp_path / "ca.crt").write_bytes(certificates.certificate_pem(made.certificate))
    return made


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Serve on loopback with the certificate of ``signer``, or without TLS; returns the port."""
    servers: list[HTTPServer] = []

    def start(signer: Signer | None, ahead: timedelta = timedelta(), status: int = 200) -> int:
        handler = type("Handler", (_Health,), {"ahead": ahead, "status": status})
        server = HTTPServer(("127.0.0.1", 0), handler)
        if signer is not None:
            key = certificates.new_key()
            certificate = certificates.server("oncology", key.public_key(), ["fed.example.org"], 10, signer)
            (tmp_path / "server.crt").write_bytes(certificates.certificate_pem(certificate))
            certificates.write_key(tmp_path / "server.key", key)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return int(server.server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_federation_s_server_is_reached_and_its_clock_read(
    serving: Callable[..., int], signer: Signer, tmp_path: Path
) -> None:
    assert abs(reach("127.0.0.1", serving(signer), tmp_path / "ca.crt")) < 5
    ahead = reach("127.0.0.1", serving(signer, timedelta(hours=1)), tmp_path / "ca.crt")
    assert abs(ahead - 3600) < 5
    with pytest.raises(UserError, match=r"this machine's clock is 3\d{3} s behind that of there; set it"):
        require_clock(ahead, "there")
    with pytest.raises(UserError, match=r"this machine's clock is 3600 s ahead of that of there"):
        require_clock(-3600.0, "there")
    require_clock(200.0, "there")


@pytest.mark.parametrize(
    ("days", "said"),
    [(-30, "the server's certificate has expired"), (30, "is not valid yet .* set this machine's clock")],
)
def test_a_certificate_out_of_its_time_is_refused(
    serving: Callable[..., int],
    signer: Signer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    days: int,
    said: str,
) -> None:
    at = certificates.now()
    with monkeypatch.context() as made:
        made.setattr(certificates, "now", lambda: at + timedelta(days=days))
        wide = Signer(signer.key, certificates.authority("oncology", signer.key, 3650))
        port = serving(wide)
        made.setattr(certificates, "now", lambda: at - timedelta(days=365))
        anchor = certificates.authority("oncology", signer.key, 3650)
    (tmp_path / "ca.crt").write_bytes(certificates.certificate_pem(anchor))
    with pytest.raises(UserError, match=said):
        reach("127.0.0.1", port, tmp_path / "ca.crt")


def test_another_authority_is_refused(serving: Callable[..., int], signer: Signer, tmp_path: Path) -> None:
    key = certificates.new_key()
    other = Signer(key, certificates.authority("oncology", key, 10))
    with pytest.raises(UserError, match=r"not signed by .*ca.crt; this is another server, or one that sits in between"):
        reach("127.0.0.1", serving(other), tmp_path / "ca.crt")


def test_another_name_is_refused(
    serving: Callable[..., int], signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "LOCAL", ("elsewhere.example.org",))
    port = serving(signer)
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(UserError, match="the server's certificate is for other names"):
            reach(host, port, tmp_path / "ca.crt")


def test_a_server_without_tls_is_sent_nothing(serving: Callable[..., int], signer: Signer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="speaks no TLS, so nothing is sent there"):
        reach("127.0.0.1", serving(None), tmp_path / "ca.crt")


def test_nobody_there_no_such_host_and_another_service_are_told_apart(
    serving: Callable[..., int], signer: Signer, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(UserError, match="nobody listens there; is the server started"):
        reach("127.0.0.1", free, tmp_path / "ca.crt")
    with pytest.raises(UserError, match=r"no-such-host.invalid: no such host"):
        reach("no-such-host.invalid", 9092, tmp_path / "ca.crt")
    with pytest.raises(UserError, match="answered 404 and is no SuperLink"):
        reach("127.0.0.1", serving(signer, status=404), tmp_path / "ca.crt")


def test_a_site_s_certificate_makes_no_server(serving: Callable[..., int], signer: Signer, tmp_path: Path) -> None:
    """A site cannot play the server to another one, not even under a name that would fit."""
    key = certificates.new_key()
    made = certificates.site(key.public_key(), "127.0.0.1", 10, signer)
    port = serving(signer)
    server = HTTPServer(("127.0.0.1", 0), _Health)
    (tmp_path / "site.crt").write_bytes(certificates.certificate_pem(made))
    certificates.write_key(tmp_path / "site.key", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "site.crt", tmp_path / "site.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        with pytest.raises(UserError, match=r"its certificate is not signed by"):
            reach("127.0.0.1", int(server.server_port), tmp_path / "ca.crt")
    finally:
        server.shutdown()
        server.server_close()
    reach("127.0.0.1", port, tmp_path / "ca.crt")
