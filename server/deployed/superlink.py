"""Flower's SuperLink, of which other machines reach the sites' interface only.

Flower serves sites, coordinators and apps at one port and asks coordinators for no password: whoever reaches the port
may register sites and submit jobs. Here only this machine may. What was refused, and what was asked of the control
interface by whatever program, is in the server's audit log.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from flwr.supercore import sql_mixin
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...core.errors import UserError
from ...core.watching import logs
from ...deployment.certificates import pem_fingerprint
from ...deployment.kits import SERVER_KIT, ServerKit
from ...privacy.auditlog import AuditLog

log = logging.getLogger("fedgraft.server")
_FOR_ALL = ("/v1/fleet/", "/health")
_REFUSED = b"only processes on the server's own machine may do this\n"
_CONTROL = "/v1/control/"
_ACTS = ("start-run", "stop-run", "register-node", "unregister-node")
_TURNED_AWAY = {
    401: "a key that is not registered, or a clock that is off",
    403: "from another machine",
    412: "a key that is not registered",
}
#: The same refusal is written down once in this many seconds, and so many different ones: a stranger fills no disk.
_AGAIN, _MOST = 600.0, 200
#: Milliseconds that a request waits for others to be done with the database; SQLite's own default is 5 s.
_BUSY = "60000"


class OwnMachine:
    """ASGI middleware: from another machine nothing passes but what sites need."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _passes(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_REFUSED)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSED})


class Witness:
    """ASGI middleware: writes into ``audit_log`` who was refused, and what was asked of the control interface."""

    def __init__(self, app: ASGIApp, audit_log: AuditLog) -> None:
        self.app = app
        self._audit_log = audit_log
        self._told: dict[tuple[object, ...], float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start" and (line := self._line(scope, message["status"])):
                await run_in_threadpool(self._write, line)
            await send(message)

        await self.app(scope, receive, seen)

    def _line(self, scope: Scope, status: int) -> dict[str, Any] | None:
        """What is written down of an answer with ``status``; None where nothing is."""
        address = scope["client"][0] if scope.get("client") else "?"
        path = scope["path"][:200]
        if status in _TURNED_AWAY and not (status == 403 and _passes(scope)):
            line = {"why": _TURNED_AWAY[status], "address": address, "path": path}
            if status != 403:
                line["key"] = _key(scope)
            return {"event": "refused", **line} if self._is_news(tuple(line.values())) else None
        call = path.removeprefix(_CONTROL)
        if path.startswith(_CONTROL) and call in _ACTS:
            return {"event": "control", "call": call, "address": address, "status": status}
        return None

    def _is_news(self, line: tuple[object, ...]) -> bool:
        now = time.monotonic()
        self._told = {told: at for told, at in self._told.items() if now - at < _AGAIN}
        if line in self._told or len(self._told) >= _MOST:
            return False
        self._told[line] = now
        return True

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._audit_log.write(**line)
        except UserError as error:
            # Who was refused stays refused; `fedgraft server start` acts on no roster that it cannot write down.
            log.error("%s", error)


def _key(scope: Scope) -> str:
    """The fingerprint of the public key that a request came with."""
    sent = dict(scope["headers"]).get(FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), b"")
    try:
        return pem_fingerprint(base64.b64decode(sent, validate=True))
    except ValueError:
        return "none that can be read"


def _passes(scope: Scope) -> bool:
    return bool(scope["path"].startswith(_FOR_ALL) or own_machine(scope))


def own_machine(scope: Any) -> bool:
    """Whether a request came from this machine: from the loopback interface, or from the very address it went to."""
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    if server is not None and client[0] == server[0]:
        return True
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def main() -> None:
    """`flower-superlink` behind :class:`Witness` and :class:`OwnMachine`; it ends with the process that started it."""
    start_parent_process_monitor(os.getppid())
    logs.begin(sys.stderr)
    found = extensions.get_middleware
    audit_log = AuditLog(ServerKit.open(Path(os.environ[SERVER_KIT])).state)

    def guarded() -> tuple[Middleware, ...]:
        return (Middleware(Witness, audit_log=audit_log), Middleware(OwnMachine), *found())

    extensions.get_middleware = guarded
    # A site does not send an answer twice: one that finds the database busy for five seconds would be lost.
    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", _BUSY))  # type: ignore[assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
