"""The worker's handle on the process that answers, which holds the site's ClientApp and all that is costly in memory.

The two share a socket that has no name, so no other process can come to it, whatever its rights.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as PackedContext
from flwr.proto.message_pb2 import Message as PackedMessage
from flwr.supercore.task_identity import TaskIdentity

from ...core.errors import UserError
from .frames import receive_frame, send_frames


class AnswererDiedError(UserError):
    """The answerer is gone; the text says why, and what the site's people can do."""


class AnswererLateError(UserError):
    """The answerer gave no answer in time."""


class Answerer:
    """The answering process, begun when it is first needed and anew when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """Begin the process, unless it is there: its imports take some seconds, in which nobody need wait."""
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel, self._process
        self.stop()
        here, there = socket.socketpair()
        with there:
            # -P: no module is taken from the folder where the worker was started.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedgraft.client.warm.served", str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.PIPE,
            )
        self._channel = here
        return self._channel, self._process

    def ask(self, message: Message, context: Context, seconds: float) -> tuple[Message, Context]:
        """The answer to ``message`` and what the site knows after it, within ``seconds``.

        Raises :class:`AnswererDiedError` or :class:`AnswererLateError`; the process is gone afterwards.
        """
        channel, process = self.start()
        deadline = time.monotonic() + seconds
        try:
            frames = (message_to_proto(message).SerializeToString(), context_to_proto(context).SerializeToString())
            channel.settimeout(seconds)
            send_frames(channel, TaskIdentity.task_id.to_bytes(8, "big"), *frames)
            packed = []
            for _ in frames:
                channel.settimeout(max(0.001, deadline - time.monotonic()))
                packed.append(receive_frame(channel))
        except TimeoutError:
            self.stop()
            raise AnswererLateError(
                f"the site's answerer gave no answer within {seconds:.0f} s and was ended; let it have longer with "
                "--deadline, or see in the site's log where it stood still"
            ) from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            why = _death(process.poll())
            self.stop()
            raise AnswererDiedError(f"the site's answerer died: {why}") from None
        reply, known = PackedMessage.FromString(packed[0]), PackedContext.FromString(packed[1])
        return message_from_proto(reply), context_from_proto(known)

    def stop(self) -> None:
        """End the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process = self._channel = None


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "it was killed (signal 9), as Linux does where memory runs out; give it more, or lower train.batch_size"
    if code is not None and code < 0:
        return f"signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}; the site's log says more"
