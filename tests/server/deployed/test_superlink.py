"""From another machine, sites' requests pass and nothing else does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import sql_mixin
from flwr.superlink import extensions

from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SERVER_KIT
from fedgraft.privacy.auditlog import AuditLog, audit_journal
from fedgraft.server.deployed import superlink
from fedgraft.server.deployed.superlink import OwnMachine, Witness, own_machine

SITE, SERVER = ("10.0.0.9", 40000), ("10.0.0.7", 9092)


def _ask(path: str, client: tuple[str, int] | None, server: tuple[str, int] | None = SERVER) -> int:
    """The status of the answer; 200 where the request was passed on."""
    status: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {"type": "http", "path": path, "client": client, "server": server}
    asyncio.run(OwnMachine(app)(scope, None, send))  # type: ignore[arg-type]
    return status[0]


@pytest.mark.parametrize("path", ["/v1/fleet/activate-node", "/v1/fleet/pull-messages", "/health"])
def test_what_sites_need_passes_from_anywhere(path: str) -> None:
    assert _ask(path, SITE) == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/", ""),
        *("//v1/fleet/x", "/v1/fleetx", "/V1/FLEET/x", "/v1/control/../fleet/x", "/openapi.json"),
    ],
)
def test_everything_else_is_refused_from_another_machine(path: str) -> None:
    assert _ask(path, SITE) == 403
    assert _ask(path, None) == 403


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "10.0.0.7"])
def test_the_server_s_own_machine_may_do_all(client: str) -> None:
    assert _ask("/v1/control/start-run", (client, 40000)) == 200


@pytest.mark.parametrize("client", ["10.0.0.9", "::ffff:10.0.0.9", "fe80::1", "testclient", ""])
def test_no_other_address_is_this_machine(client: str) -> None:
    assert not own_machine({"client": (client, 1), "server": SERVER})
    assert not own_machine({"client": (client, 1), "server": None})


# What is written down


def _seen(folder: Path, *requests: tuple[str, int, dict[str, str]]) -> list[dict[str, Any]]:
    """The audit log after requests (path, status of the answer, headers) from a site."""
    witness = Witness(None, AuditLog(folder))  # type: ignore[arg-type]

    async def send(message: Any) -> None:
        return None

    for path, status, headers in requests:

        async def app(scope: Any, receive: Any, send: Any, status: int = status) -> None:
            await send({"type": "http.response.start", "status": status, "headers": []})

        witness.app = app
        sent = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": path, "client": SITE, "server": SERVER, "headers": sent}
        asyncio.run(witness(scope, None, send))  # type: ignore[arg-type]
    return audit_journal(folder / "audit.jsonl").entries()


@pytest.mark.parametrize("status", [401, 412])
def test_a_key_that_is_turned_away_is_in_the_audit_log_by_its_fingerprint_and_once(tmp_path: Path, status: int) -> None:
    key = certificates.new_key().public_key()
    header = {"flwr-public-key": base64.b64encode(certificates.public_pem(key).encode()).decode()}
    stranger = ("/v1/fleet/activate-node", status, header)
    first, second = _seen(tmp_path, stranger, stranger, ("/v1/fleet/activate-node", status, {"flwr-public-key": "?"}))
    assert (first["event"], first["address"], first["key"]) == ("refused", SITE[0], certificates.key_fingerprint(key))
    assert second["key"] == "none that can be read"


def test_commands_are_in_the_audit_log_whoever_gave_them_and_other_requests_are_not(tmp_path: Path) -> None:
    # Flower answers so too where a run is over.
    over = ("/v1/fleet/push-messages", 403, {})
    fine = [("/v1/fleet/pull-messages", 200, {}), over, ("/health", 200, {}), ("/v1/control/list-nodes", 200, {})]
    given, refused = _seen(tmp_path, *fine, ("/v1/control/start-run", 200, {}), ("/v1/control/start-run", 403, {}))
    assert (given["event"], given["call"], given["status"]) == ("control", "start-run", 200)
    assert (refused["event"], refused["why"]) == ("refused", "from another machine")


def test_strangers_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "_MOST", 5)
    found = _seen(tmp_path, *((f"/{number}" + "x" * 10**6, 403, {}) for number in range(20)))
    assert len(found) == 5 and (tmp_path / "audit.jsonl").stat().st_size < 5000


def test_a_full_disk_does_not_let_a_stranger_in(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        _seen(tmp_path, ("/v1/fleet/activate-node", 401, {}))


def test_flower_puts_the_guard_in_front_of_all_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink.main import create_app

    found: list[Any] = []
    # What the command would serve, built where the command would serve it.
    monkeypatch.setattr(superlink, "flower_superlink", lambda: found.append(create_app()))
    monkeypatch.setattr(superlink, "start_parent_process_monitor", lambda pid: None)
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    (tmp_path / "federation.toml").write_text(
        'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'
    )
    Authority.create(tmp_path / "federation.toml", tmp_path / "kits")
    monkeypatch.setenv(SERVER_KIT, str(tmp_path / "kits" / "server"))
    superlink.main()
    (app,) = found
    assert [entry.cls for entry in app.user_middleware[:2]] == [Witness, OwnMachine]
    with contextlib.closing(sqlite3.connect(tmp_path / "link.db")) as connection:
        sql_mixin._set_sqlite_pragmas(connection, None)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (60_000,), "as Flower opens its database"
