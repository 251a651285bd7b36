"""Answers taken as they come: Flower's own wait between two looks is three seconds, which every exchange would pay."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import cast

from flwr.app import Error, Message, MessageType
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


def prompt(grid: Grid, most_late: int = 0) -> Grid:
    """``grid``, where it is a deployment's, with a shorter wait in ``send_and_receive``; else as it is.

    Each training also takes what comes of the ``most_late`` trainings before it.
    """
    return cast(Grid, _Prompt(grid, most_late)) if isinstance(grid, HttpGrid) else grid


class _Prompt:
    """All of Flower's grid but its way of waiting, and of saying that a site is lost."""

    def __init__(self, grid: HttpGrid, most_late: int) -> None:
        self._grid = grid
        self._most_late = most_late
        # Messages of trainings that ended without an answer to them, and their rounds.
        self._unanswered: dict[str, int] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As Flower's: the replies that came within ``timeout`` seconds; None waits for all those to ``messages``."""
        # A list: Flower goes through them twice.
        asked = list(messages)
        sent = dict(zip(self._grid.push_messages(asked), asked, strict=True))
        waiting = set(sent)
        training = bool(self._most_late and asked) and asked[0].metadata.message_type == MessageType.TRAIN
        round = int(asked[0].metadata.group_id) if training else 0
        past = self._unanswered.items() if training else ()
        late = {identity: number for identity, number in past if round - number <= self._most_late}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self._grid.pull_messages(waiting | late.keys()):
                identity = reply.metadata.reply_to_message_id
                if identity in sent:
                    replies.append(_named(reply, sent[identity]))
                elif not reply.has_error():
                    replies.append(reply)
                waiting.discard(identity)
                late.pop(identity, None)
            if waiting:
                time.sleep(LOOK)
        if training:
            self._unanswered = late | dict.fromkeys(waiting, round)
        return replies


def _named(reply: Message, asked: Message) -> Message:
    """``reply``, or in place of Flower's own that a site is lost one that says which: Flower's comes from nobody."""
    if not reply.has_error() or reply.metadata.src_node_id == asked.metadata.dst_node_id:
        return reply
    code = reply.error.code
    return Message(Error(code, _SAID.get(code, reply.error.reason)), reply_to=asked)
