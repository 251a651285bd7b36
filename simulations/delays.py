"""Answers of simulated sites that come when their round is over, where the run still counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from ..core.config import RunConfig
from ..core.wire import content_bytes, no_answer
from ..server.prompt import prompt
from .fate import Fate, Fates


def delayed(grid: Grid, config: RunConfig) -> Grid:
    """``grid``, on which the answers of late sites come rounds later; as it is, where they count no more then."""
    fates = Fates(config)
    return cast(Grid, Delays(prompt(grid), fates)) if config.server.most_late and not fates.none else grid


class Delays:
    """All of ``grid``, but that an answer that is late by ``fates`` is held back until the round in which it arrives.

    It comes then before what the same node answers in that round.
    """

    def __init__(self, grid: Grid, fates: Fates) -> None:
        self._grid = grid
        self._fates = fates
        # By the round in which they arrive.
        self._held: dict[int, list[Message]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """As the grid's; one answer at a time."""
        asked: dict[int, Message] = {}
        if isinstance(messages, list):  # which Flower's own grid goes through twice
            asked = {message.metadata.dst_node_id: message for message in messages}
        else:
            messages = _noted(messages, asked)
        due: list[Message] | None = None
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            message = asked.pop(reply.metadata.src_node_id, None)
            if message is None or message.metadata.message_type != MessageType.TRAIN:
                yield reply
                continue
            number = int(message.metadata.group_id)
            if due is None:
                due = [each for arrives in sorted(self._held) if arrives <= number for each in self._held.pop(arrives)]
            for each in [each for each in due if each.metadata.src_node_id == reply.metadata.src_node_id]:
                due.remove(each)
                yield each
            fate, rounds = self._late(message, reply)
            if fate is not None:
                self._held.setdefault(number + rounds, []).append(reply)
                yield no_answer(message, fate.fault, fate.why)
            else:
                yield reply
        yield from due or ()

    def _late(self, message: Message, reply: Message) -> tuple[Fate | None, int]:
        """What befalls a site whose training is done too late, and in how many rounds its ``reply`` arrives."""
        if reply.has_error() or reply.content["site"]["error"]:
            return None, 0
        site, number = str(message.content["job"]["site"]), int(message.metadata.group_id)
        down, up = content_bytes(message.content), content_bytes(reply.content)
        fate = self._fates.of("train", site, number)
        if fate is None and self._fates.clock.runs:
            fate = self._fates.late(site, down, up)
        if fate is None or fate.fault != "late":
            return None, 0
        return fate, self._fates.rounds_late(site, down, up)


def _noted(messages: Iterable[Message], asked: dict[int, Message]) -> Iterator[Message]:
    for message in messages:
        asked[message.metadata.dst_node_id] = message
        yield message
