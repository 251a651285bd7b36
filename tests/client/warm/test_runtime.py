"""A worker and a real SuperNode's runtime interface: who may take a task, and that the answer arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from fedgraft.client.warm import runtime
from fedgraft.client.warm.bundle import bundle_hash
from fedgraft.client.warm.runtime import StrangerError, SuperNode
from fedgraft.core.errors import UserError
from fedgraft.core.wire import encode_refusal

SECRET = b"a secret of this test"


class Node:
    """A SuperNode without its SuperLink: its interface on loopback, and its memory."""

    def __init__(self, address: str, state: NodeState) -> None:
        self.address = address
        self.state = state

    def give(self, content: RecordDict, bundle: bytes = b"bundle") -> Message:
        """Have a message wait for whoever takes the task."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
        message = Message(content, dst_node_id=2, message_type="train")
        message.metadata.__dict__["_message_id"] = message.object_id
        state = self.state
        digest = state.store_fab(Fab(bundle_hash(bundle), bundle, {}))
        state.store_run(_run(message.metadata.run_id, digest))
        state.set_run_series_context(1, Context(message.metadata.run_id, 2, {"site": "north"}, RecordDict(), {}, 1))
        assert state.create_task(task_type=TaskType.CLIENT_APP, run_id=message.metadata.run_id, fab_hash=digest)
        state.object_store.preregister(message.metadata.run_id, get_object_tree(message))
        for key, part in get_all_nested_objects(message).items():
            state.object_store.put(key, part.deflate())
        state.store_message(message)
        return message


def _run(number: int, bundle: str) -> Run:
    run = Run.create_empty(number)
    run.fab_hash, run.series_id = bundle, 1
    return run


@contextmanager
def running(secret: bytes | None) -> Iterator[Node]:
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    factory.state().set_node_id(2)
    app = create_app(state_factory=factory, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Node(f"127.0.0.1:{port}", factory.state())
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def guarded() -> Iterator[Node]:
    with running(SECRET) as node:
        yield node


def test_a_task_is_taken_once_and_its_answer_arrives_with_what_the_site_knows(guarded: Node) -> None:
    sent = guarded.give(RecordDict({"job": ConfigRecord({"round": 3})}), bundle=b"the bundle")
    node = SuperNode(guarded.address, SECRET, None)
    node.require_guarded()
    token = node.acquire()
    assert token and node.acquire() == ""
    with node.task(token) as task:
        message = task.read()
        assert message.content["job"] == ConfigRecord({"round": 3})
        assert message.metadata.message_id == task.envelope.metadata.message_id == sent.metadata.message_id
        assert (task.bundle, task.context.node_config) == (b"the bundle", {"site": "north"})
        task.context.state["kept"] = ConfigRecord({"x": 1})
        task.answer(Message(RecordDict({"site": ConfigRecord({"y": 2})}), reply_to=task.envelope), task.context)
    (reply,) = guarded.state.get_messages_legacy(is_reply=True)
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id
    kept: Any = guarded.state.get_run_series_context(1)
    assert kept.state["kept"] == ConfigRecord({"x": 1})
    with pytest.raises(UserError, match="cannot be taken from the SuperNode"), node.task(token):
        raise AssertionError("a task was taken twice")


@pytest.mark.parametrize("secret", [b"another secret", SECRET + b" "])
def test_a_worker_with_another_secret_is_turned_away(guarded: Node, secret: bytes) -> None:
    guarded.give(RecordDict({"job": ConfigRecord({"round": 4})}))
    with pytest.raises(StrangerError, match="turns this worker away; start it with --isolation process"):
        SuperNode(guarded.address, secret, None).acquire()
    assert SuperNode(guarded.address, SECRET, None).acquire() != "", "the task is still there"


def test_a_supernode_that_hands_its_tasks_to_anybody_is_refused() -> None:
    with running(None) as node:
        node.give(RecordDict({"job": ConfigRecord({"round": 1})}))
        with pytest.raises(StrangerError, match="hands its tasks to anybody"):
            SuperNode(node.address, SECRET, None).require_guarded()


def test_a_supernode_that_is_not_there_is_said_to_be_unreached() -> None:
    node = SuperNode("127.0.0.1:1", SECRET, None)
    for ask in (node.acquire, node.require_guarded):
        with pytest.raises(UserError, match="cannot be reached") as refused:
            ask()
        assert not isinstance(refused.value, StrangerError)


@pytest.mark.parametrize("limit", [100, 1])
def test_a_message_beyond_the_limit_is_not_read_and_can_still_be_refused(
    guarded: Node, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(runtime, "LIMIT", limit)
    guarded.give(RecordDict({"job": ConfigRecord({"text": "x" * 200 + str(limit)})}))
    node = SuperNode(guarded.address, SECRET, None)
    with node.task(node.acquire()) as task:
        with pytest.raises(UserError, match=r"cannot be read: .*takes more than"):
            task.read()
        refusal = encode_refusal(UserError("too large"), site="north", round=0)
        task.answer(Message(refusal, reply_to=task.envelope), task.context)
    replies = guarded.state.get_messages_legacy(is_reply=True)
    assert task.envelope.metadata.message_id in [reply.metadata.reply_to_message_id for reply in replies]


def test_a_message_of_broken_parts_is_not_read_and_can_still_be_refused(guarded: Node) -> None:
    sent = guarded.give(RecordDict({"job": ConfigRecord({"round": 9})}))
    store: Any = guarded.state.object_store
    for key in get_all_nested_objects(sent):
        store.store[key].content = b"ConfigRecord 3\0{{{"
    node = SuperNode(guarded.address, SECRET, None)
    with node.task(node.acquire()) as task, pytest.raises(UserError, match="the instruction cannot be read"):
        task.read()


def test_an_answer_that_nobody_takes_is_one_line(guarded: Node) -> None:
    guarded.give(RecordDict({"job": ConfigRecord({"round": 5})}))
    node = SuperNode(guarded.address, SECRET, None)
    with pytest.raises(UserError, match="could not be handed to the SuperNode"), node.task(node.acquire()) as task:
        state: Any = guarded.state
        state.task_token_to_task_id.clear()
        task.answer(Message(RecordDict(), reply_to=task.envelope), task.context)
