"""What the server and a worker of the engine `workers` say to each other: a line of JSON and some bytes after it.

Over `multiprocessing.connection`, not over the collectives of `torch.distributed`: a receive from any rank does not
notice that one has died (measured with gloo), cannot be interrupted, and no rank can leave. Here one call waits for
all workers, and the end of one is the end of its stream, at once.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

#: Seconds after which a machine that says nothing any more is taken for lost: silent for so long, then asked so often.
_SILENT, _ASKED = 10, 3


class Closed(Exception):
    """The other side has ended."""


class Channel:
    """One end of a conversation. Raises :class:`Closed` when the other end is gone."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @classmethod
    def of(cls, end: socket.socket) -> Channel:
        """Over a socket, which is the channel's from now on; one over the network learns when the machine is lost."""
        if end.family != socket.AF_UNIX:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", _SILENT), ("TCP_KEEPINTVL", _SILENT // 2), ("TCP_KEEPCNT", _ASKED)):
                if hasattr(socket, name):
                    end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        end.setblocking(True)
        return cls(Connection(end.detach()))

    def send(self, head: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        try:
            self.connection.send_bytes(json.dumps({**head, "parts": len(parts)}).encode())
            for part in parts:
                self.connection.send_bytes(part)
        except OSError:
            raise Closed from None

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """The next message, waited for."""
        try:
            head = json.loads(self.connection.recv_bytes())
            return head, [self.connection.recv_bytes() for _ in range(head["parts"])]
        except (EOFError, OSError):
            raise Closed from None

    def stop(self) -> None:
        """Tell the other end, if it is there, that this was all."""
        with contextlib.suppress(Closed):
            self.send({"is": "stop"})
        self.close()

    def close(self) -> None:
        self.connection.close()


def to_bytes(content: RecordDict) -> bytes:
    """Records in Flower's own form."""
    return recorddict_to_proto(content).SerializeToString()


def from_bytes(data: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(data))
