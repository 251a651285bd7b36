"""Flower's SuperLink, of which other machines reach the sites' interface only.

Flower serves sites, coordinators and apps at one port and asks coordinators for no password: whoever reaches the port
may register sites and submit jobs. Here only this machine may.
"""

from __future__ import annotations

import ipaddress
import os
from typing import Any

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_FOR_ALL = ("/v1/fleet/", "/health")
_REFUSED = b"only processes on the server's own machine may do this\n"


class OwnMachine:
    """ASGI middleware: from another machine nothing passes but what sites need."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(_FOR_ALL) or own_machine(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_REFUSED)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSED})


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
    """`flower-superlink` with :class:`OwnMachine` outermost; it ends with the process that started it."""
    start_parent_process_monitor(os.getppid())
    found = extensions.get_middleware

    def guarded() -> tuple[Middleware, ...]:
        return (Middleware(OwnMachine), *found())

    extensions.get_middleware = guarded
    flower_superlink()


if __name__ == "__main__":
    main()
