"""The process of a SuperNode: Flower's own command, which ends with the process that started it.

Else a site whose `fedgraft site start` was killed would go on, and a second one would take part beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

#: The least that a SuperNode waits between two looks for a message, or for the worker's answer.
SOON = 0.2
#: What it waits else, as a part of the time since there was one.
PART = 0.1


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


def main() -> None:
    """`flower-supernode`, watched over."""
    start_parent_process_monitor(os.getppid())
    start_client_internal.time = Waiting()  # type: ignore[assignment]
    flower_supernode()


if __name__ == "__main__":
    main()
