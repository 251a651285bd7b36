"""What the answering process does: `python -m fedgraft.client.warm.served`, begun by the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from pathlib import Path

from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context, Message
from flwr.supercore.task_identity import TaskIdentity

from ..installed import installed_digest
from .frames import receive_frame, send_frames

#: Where memory runs out, Linux ends this process before the worker.
_FIRST_TO_GO = "500"


def _main(channel: socket.socket) -> None:
    """Answer what comes over ``channel`` until the worker is gone."""
    # Before anything else is loaded: it is what runs from here on.
    installed_digest()
    from ..app import app

    while True:
        try:
            task_id = int.from_bytes(receive_frame(channel), "big")
            message = message_from_proto(Message.FromString(receive_frame(channel)))
            context = context_from_proto(Context.FromString(receive_frame(channel)))
        except EOFError:
            return
        # What Flower's messages say of who made them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, context.run_id, context.node_id
        reply = app(message, context)
        send_frames(channel, message_to_proto(reply).SerializeToString(), context_to_proto(context).SerializeToString())


def _ends_with_the_worker() -> None:
    """Wait for the worker's end of standard input to close, and go, whatever this process is at.

    What a training that breaks off has reserved stays counted in the ledger.
    """
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    threading.Thread(target=_ends_with_the_worker, daemon=True).start()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    _main(socket.socket(fileno=int(sys.argv[1])))
