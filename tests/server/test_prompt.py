"""Replies are taken as they come, and as Flower's own grid would take them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgraft.core.wire import fault_of
from fedgraft.server.prompt import LOOK, prompt
from fedgraft.simulations.engines.inprocess import InProcessGrid


class Answering(HttpGrid):
    """Flower's grid without its SuperLink: each message is answered some seconds after it was sent."""

    def __init__(self, delays: dict[int, float]) -> None:
        self.delays, self.looks = delays, 0
        self.due: dict[str, tuple[float, Message]] = {}
        self.lost: dict[int, int] = {}
        self.pulled: list[set[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        now = time.monotonic()
        assert all(message.metadata.message_type for message in messages), "Flower checks all before it sends them"
        pushed = []
        for message in messages:
            identity = str(len(self.due))
            pushed.append(identity)
            message.metadata.__dict__["_message_id"] = identity
            delay = self.delays[message.metadata.dst_node_id]
            reply = Message(RecordDict(), reply_to=message)
            if message.metadata.dst_node_id in self.lost:
                code = self.lost[message.metadata.dst_node_id]
                reply = Message(Error(code, "Error: Flower's own words"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            self.due[identity] = (now + delay, reply)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks += 1
        self.pulled.append(set(message_ids))
        now = time.monotonic()
        return [self.due[key][1] for key in message_ids if self.due[key][0] <= now]

    def get_node_ids(self) -> list[int]:
        return [5]

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def sent(grid: Any, nodes: Iterable[int], timeout: float | None) -> tuple[list[int], float]:
    began = time.monotonic()
    messages = (Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes)
    replies = grid.send_and_receive(messages, timeout=timeout)
    return [reply.metadata.src_node_id for reply in replies], time.monotonic() - began


def test_replies_come_in_their_order_and_soon() -> None:
    found, seconds = sent(prompt(Answering({1: 0.3, 2: 0.0, 3: 0.1})), (1, 2, 3), None)
    assert found[0] == 2 and sorted(found) == [1, 2, 3] and 0.3 <= seconds < 0.3 + 5 * LOOK < 3


def test_who_does_not_answer_in_time_is_left_out() -> None:
    found, seconds = sent(prompt(Answering({1: 60.0, 2: 0.0})), (1, 2), 0.5)
    assert found == [2] and 0.5 <= seconds < 0.5 + 5 * LOOK


def test_nobody_is_waited_for_where_nothing_is_sent() -> None:
    grid = Answering({})
    assert sent(prompt(grid), (), None)[0] == [] and grid.looks == 0


def test_everything_else_is_flower_s() -> None:
    grid = Answering({})
    assert list(prompt(grid).get_node_ids()) == [5] and prompt(grid) is not grid


def test_the_grid_of_a_simulation_is_left_as_it_is() -> None:
    grid = object.__new__(InProcessGrid)
    assert prompt(grid) is grid


@pytest.mark.parametrize(
    ("code", "said", "fault"),
    [
        (ErrorCode.NODE_UNAVAILABLE, "the connection to it was lost", "absent"),
        (ErrorCode.MESSAGE_UNAVAILABLE, "no answer in time", "late"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "no answer in time", "late"),
    ],
)
def test_a_site_that_is_lost_or_late_is_named_which_flower_does_not(code: int, said: str, fault: str) -> None:
    grid = Answering({7: 0.0, 8: 0.0})
    grid.lost = {8: code}
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in (7, 8)]
    fine, lost = sorted(prompt(grid).send_and_receive(messages), key=lambda reply: reply.has_error())
    assert fine.metadata.src_node_id == 7 and not fine.has_error()
    assert lost.metadata.src_node_id == 8
    assert (lost.error.code, lost.error.reason, fault_of(lost.error)) == (code, said, fault)


def trained(grid: Any, delays: dict[int, float], number: int, kind: str = "train") -> list[tuple[int, str]]:
    """A round that waits for 0.3 s: the node and the round of each answer."""
    grid._grid.delays = delays
    messages = [Message(RecordDict(), dst_node_id=node, message_type=kind, group_id=str(number)) for node in delays]
    replies = grid.send_and_receive(messages, timeout=0.3)
    assert not any(reply.has_error() for reply in replies)
    return sorted((reply.metadata.src_node_id, reply.metadata.group_id) for reply in replies)


def test_a_training_also_takes_what_comes_of_the_trainings_before_it_once_and_waits_for_none() -> None:
    plain = Answering({})
    grid = prompt(plain, 2)
    hold = threading.Event()
    real = plain.pull_messages
    plain.pull_messages = lambda ids: [r for r in real(ids) if hold.is_set() or r.metadata.group_id != "1"]  # type: ignore[method-assign]
    assert trained(grid, {1: 0.0, 2: 0.0}, 1) == []
    began = time.monotonic()
    assert trained(grid, {1: 0.0}, 2) == [(1, "2")]
    assert time.monotonic() - began < 0.3, "those that are late are not waited for"
    hold.set()
    assert trained(grid, {1: 0.0}, 2, "evaluate") == [(1, "2")], "an evaluation is no place for them"
    assert trained(grid, {1: 0.0}, 3) == [(1, "1"), (1, "3"), (2, "1")]
    assert trained(grid, {1: 0.0}, 4) == [(1, "4")]


def test_what_is_too_old_is_asked_for_no_more_nor_anything_late_where_none_is_wanted() -> None:
    for most_late, asked in ((0, [{"0"}, {"1"}, {"2"}]), (1, [{"0"}, {"0", "1"}, {"1", "2"}]), (2, [{"0", "1", "2"}])):
        plain = Answering({})
        grid = prompt(plain, most_late)
        last = []
        for number in (1, 2, 3):
            assert trained(grid, {1: 60.0}, number) == []
            last.append(plain.pulled[-1])
        assert last[-len(asked) :] == asked


def test_flower_s_word_that_a_late_answer_will_never_come_is_taken_for_no_answer_of_this_round() -> None:
    plain = Answering({})
    grid = prompt(plain, 2)
    assert trained(grid, {8: 60.0}, 1) == []
    lost = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=plain.due["0"][1])
    lost.metadata.__dict__.update(_src_node_id=SUPERLINK_NODE_ID, _reply_to_message_id="0")
    plain.due["0"] = (0.0, lost)
    assert trained(grid, {8: 0.0}, 2) == [(8, "2")]
    trained(grid, {8: 0.0}, 3)
    assert plain.pulled[-1] == {"2"}, "it is not asked for again"
