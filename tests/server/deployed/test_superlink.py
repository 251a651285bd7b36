"""From another machine, sites' requests pass and nothing else does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flwr.superlink import extensions
from starlette.middleware import Middleware

from fedgraft.server.deployed import superlink
from fedgraft.server.deployed.superlink import OwnMachine, own_machine

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


def test_flower_puts_the_guard_in_front_of_all_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink.main import create_app

    found: list[Any] = []
    # What the command would serve, built where the command would serve it.
    monkeypatch.setattr(superlink, "flower_superlink", lambda: found.append(create_app()))
    monkeypatch.setattr(superlink, "start_parent_process_monitor", lambda pid: None)
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    superlink.main()
    (app,) = found
    assert isinstance(app.user_middleware[0], Middleware) and app.user_middleware[0].cls is OwnMachine
