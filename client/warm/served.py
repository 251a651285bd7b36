"""What the answering process does: `python -m fedgraft.client.warm.served`, begun by the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as PackedContext
from flwr.proto.message_pb2 import Message as PackedMessage
from flwr.supercore.task_identity import TaskIdentity

from ...core.errors import UserError, one_line
from ...core.watching import logs
from ...core.wire import encode_refusal
from ...privacy.auditlog import AuditLog
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
            message = message_from_proto(PackedMessage.FromString(receive_frame(channel)))
            context = context_from_proto(PackedContext.FromString(receive_frame(channel)))
        except EOFError:
            return
        # What Flower's messages say of who made them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, context.run_id, context.node_id
        try:
            reply = app(message, context)
        except Exception as error:  # of Flower's, for a kind of message that no site answers
            reply = _refused(message, context, error)
        send_frames(channel, message_to_proto(reply).SerializeToString(), context_to_proto(context).SerializeToString())


def _refused(message: Message, context: Context, error: Exception) -> Message:
    kind, site = message.metadata.message_type, str(context.node_config.get("site", "?"))
    refusal = UserError(f"a message of the kind `{kind}` is not answered here ({type(error).__name__})")
    log = AuditLog(Path(str(context.node_config["site-folder"])))
    log.write("refused", site=site, kind=kind, why=one_line(refusal))
    return Message(encode_refusal(refusal, site=site, round=0), reply_to=message)


def _ends_with_the_worker() -> None:
    """Wait for the worker's end of standard input to close, and go, whatever this process is at.

    What a training that breaks off has reserved stays counted in the ledger.
    """
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    if not logs.begin(sys.stderr):
        logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    threading.Thread(target=_ends_with_the_worker, daemon=True).start()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    _main(socket.socket(fileno=int(sys.argv[1])))
