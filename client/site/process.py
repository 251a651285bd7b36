"""The process of a SuperNode: Flower's own command, which ends with the process that started it.

Else a site whose `fedgraft site start` was killed would go on, and a second one would take part beside it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import httpx
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

from ...deployment.processes import leave_with_parent
from .leaving import LastWords

#: The least that a SuperNode waits between two looks for a message, or for the worker's answer.
SOON = 0.2
#: What it waits else, as a part of the time since there was one.
PART = 0.1
#: How OpenSSL says that a certificate does not stand for the server.
_DISTRUST = "CERTIFICATE_VERIFY_FAILED"


class Waiting:
    """The clock of Flower's SuperNode, which looks for messages every three seconds, as every exchange would pay.

    With this one it looks sooner while messages come, and as rarely as it did once none has come for half a minute, so
    that idle sites do not keep the server busy.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep) -> None:
        self._now = now
        self._wait = wait
        self._busy = now()
        self._longest = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait for ``seconds``, or less. The longest wait is the one between messages; others are for an answer."""
        self._longest = max(self._longest, seconds)
        if seconds < self._longest:
            self._busy = self._now()
        self._wait(min(seconds, max(SOON, PART * (self._now() - self._busy))))


def patient() -> RetryInvoker:
    """Flower's way to try a broken connection again, which takes one that breaks during the handshake for a refusal.

    Then an answer is dropped that took an hour to make. Only a certificate that is not the server's is a refusal.
    """
    invoker = make_simple_http_retry_invoker()
    gives_up = invoker.should_giveup

    def refused(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError):
            return _DISTRUST in str(error)
        return gives_up is not None and gives_up(error)

    invoker.should_giveup = refused
    return invoker


def main() -> None:
    """`flower-supernode`, watched over."""
    # As Ctrl-C, so that the server hears of it.
    leave_with_parent(lambda: os.kill(os.getpid(), signal.SIGINT))
    fleet_http_connection.make_simple_http_retry_invoker = patient
    fleet_http_connection.FleetHttpClient = LastWords  # type: ignore[misc]
    start_client_internal.time = Waiting()  # type: ignore[assignment]
    flower_supernode()


if __name__ == "__main__":
    main()
