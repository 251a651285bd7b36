from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fedgraft.simulations.engines.inprocess import InProcessGrid


def content() -> RecordDict:
    return RecordDict(
        {
            "adapter": ArrayRecord({"float32": Array(np.arange(4, dtype="f4"))}),
            "table": ConfigRecord({"text": "a", "list": [1, 2], "bytes": b"b"}),
            "metrics": MetricRecord({"loss": 0.5, "several": [1.0, 2.0]}),
        }
    )


def spoil(message: Message) -> None:
    """Change everything in ``message`` that can be changed."""
    message.metadata.__dict__["_message_id"] = "spoilt"
    message.content["adapter"]["float32"].data = b"spoilt"
    message.content["table"]["list"].append(3)
    message.content["table"]["text"] = "spoilt"
    del message.content["metrics"]["loss"]
    message.content["more"] = ConfigRecord({"x": 1})


class Spoiling:
    """A ClientApp that keeps what it was sent and what it answered, and spoils the one."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answered: list[Message] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.sent.append(copy.deepcopy(message))
        self.answered.append(Message(content(), reply_to=message))
        spoil(message)
        return self.answered[-1]


def test_neither_end_can_change_what_the_other_holds() -> None:
    app = Spoiling()
    grid = InProcessGrid(app, 1)  # type: ignore[arg-type]
    (node,) = grid.get_node_ids()
    sent = Message(content(), dst_node_id=node, message_type="train", group_id="1")
    (reply,) = grid.send_and_receive([sent])
    assert sent.content == content() and app.sent[0].content == content()
    assert app.sent[0].metadata == sent.metadata and sent.metadata.message_id not in ("", "spoilt")
    assert reply.content == content() and reply.metadata.reply_to_message_id == sent.metadata.message_id
    spoil(reply)
    assert app.answered[0].content == content() and app.answered[0].metadata.message_id == ""


def test_an_error_reply_crosses_as_it_is() -> None:
    grid = InProcessGrid(lambda message, context: Message(Error(7, "why"), reply_to=message), 1)  # type: ignore[arg-type]
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content(), dst_node_id=node, message_type="train")])
    assert (reply.error.code, reply.error.reason) == (7, "why")
    with pytest.raises(ValueError, match="content is None"):
        _ = reply.content
