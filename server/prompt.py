"""Answers taken as they come: Flower's own wait between two looks is three seconds, which every exchange would pay."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import cast

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

#: Seconds between two looks.
LOOK = 0.2
#: What Flower's own replies in place of a site's come to.
_SAID = {
    ErrorCode.NODE_UNAVAILABLE: "the connection to it was lost",
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer in time",
}


def prompt(grid: Grid) -> Grid:
    """``grid``, where it is a deployment's, with a shorter wait in ``send_and_receive``; else as it is."""
    return cast(Grid, _Prompt(grid)) if isinstance(grid, HttpGrid) else grid


class _Prompt:
    """All of Flower's grid but its way of waiting, and of saying that a site is lost."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As Flower's: the replies that came within ``timeout`` seconds; None waits for all."""
        # A list: Flower goes through them twice.
        asked = list(messages)
        sent = dict(zip(self._grid.push_messages(asked), asked, strict=True))
        waiting = set(sent)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = list(self._grid.pull_messages(waiting))
            replies += (_named(reply, sent[reply.metadata.reply_to_message_id]) for reply in arrived)
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting:
                time.sleep(LOOK)
        return replies


def _named(reply: Message, asked: Message) -> Message:
    """``reply``, or in place of Flower's own that a site is lost one that says which: Flower's comes from nobody."""
    if not reply.has_error() or reply.metadata.src_node_id == asked.metadata.dst_node_id:
        return reply
    code = reply.error.code
    return Message(Error(code, _SAID.get(code, reply.error.reason)), reply_to=asked)
