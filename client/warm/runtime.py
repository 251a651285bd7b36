"""A SuperNode's runtime interface, as much of it as a site's worker needs: take a task, its message, and answer.

`flower-superexec` and `flwr-clientapp` speak the same interface, the one to start the other, which unpacks the app
bundle and runs what lies in it; a worker in their place runs nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from ...core.errors import UserError, one_line
from ...core.packing import LIMIT

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
#: Seconds for which a connection that broke is tried again.
_PATIENCE = 60.0
_TURNED_AWAY = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
_MEND = "start it with --isolation process, and both with one --superexec-auth-secret-file"


class StrangerError(UserError):
    """SuperNode and worker do not know each other: there is nothing to wait for."""


@dataclass
class Task:
    """A message that waits for its answer.

    ``envelope``: the message without what it says; ``context``: what the site knows of the run; ``bundle``: the app
    bundle that came with it.
    """

    envelope: Message
    context: Context
    bundle: bytes
    _objects: ObjectTree
    _client: RuntimeHttpClient

    def read(self) -> Message:
        """The message. Raises :class:`UserError` for one that is too large or that Flower cannot read."""
        node, run = Node(node_id=self.context.node_id), self.context.run_id
        pull = make_pull_object_fn_protobuf(self._client.PullObject, node, run)
        received, lock = 0, threading.Lock()

        def counted(key: str) -> bytes:
            nonlocal received
            content = pull(key)
            with lock:  # Flower pulls several at once
                received += len(content)
            if received > LIMIT:
                raise ValueError(f"it takes more than {LIMIT} bytes")
            return content

        confirm = make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run)
        try:
            message = pull_and_inflate_object_from_tree(self._objects, counted, confirm, return_type=Message)
        except Exception as error:  # as the other end made it: a foreign reader says no in many ways
            raise UserError(f"the instruction cannot be read: {one_line(error)[:300]}") from None
        message.metadata.__dict__["_message_id"] = self._objects.object_id
        return message

    def answer(self, reply: Message, context: Context) -> None:
        """Hand the answer in, and what the site knows after it. Raises :class:`UserError` where nobody takes it."""
        try:
            push_message(self._client, reply, context)
            push_task_output(self._client, context, SubStatus.COMPLETED, "")
        except Exception as error:  # whatever Flower makes of a SuperNode that is gone or a run that ended
            raise UserError(f"the answer could not be handed to the SuperNode: {type(error).__name__}") from None


class SuperNode:
    """The SuperNode at ``address`` (host:port), which knows its worker by the ``secret`` that both read from a file.

    ``certificates``: of the authority that signed the SuperNode's runtime certificate; None for an interface without
    TLS, which must not leave the machine.
    """

    def __init__(self, address: str, secret: bytes, certificates: Path | None) -> None:
        self.address = address
        self._certificates = certificates
        self._client = self._connect(
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE})), patience=0
        )

    def _connect(self, credential: ProtobufClientInterceptor | None, patience: float) -> RuntimeHttpClient:
        retry = RetryInvoker(
            lambda: exponential(max_delay=2), (httpx.TransportError,), max_tries=None, max_time=patience or None
        )
        interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor(component_name="fedgraft")]
        return RuntimeHttpClient.from_server_address(
            self.address,
            insecure=self._certificates is None,
            root_certificates=str(self._certificates) if self._certificates is not None else None,
            interceptors=interceptors if credential is None else [*interceptors, credential],
            retry_invoker=retry if patience else None,
        )

    def require_guarded(self) -> None:
        """Raise :class:`StrangerError` where the SuperNode hands tasks to anybody.

        That is one with `--isolation subprocess`, whose own executor would run what lies in a bundle, or one without a
        secret. Raises :class:`UserError` where it cannot be reached.
        """
        with self._connect(None, patience=0) as stranger:
            try:
                stranger.AcquireTask(AcquireTaskRequest())  # of no kind, so that no task is taken
            except httpx.HTTPStatusError as error:
                if error.response.status_code in _TURNED_AWAY:
                    return
                raise self._unreached(error) from None
            except httpx.HTTPError as error:
                raise self._unreached(error) from None
        raise StrangerError(f"the SuperNode at {self.address} hands its tasks to anybody; {_MEND}")

    def acquire(self) -> str:
        """The token of a task that waits; "" where none does.

        Raises :class:`StrangerError` where the SuperNode does not know the worker, :class:`UserError` where it cannot
        be reached.
        """
        try:
            return self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _TURNED_AWAY:
                raise StrangerError(f"the SuperNode at {self.address} turns this worker away; {_MEND}") from None
            raise self._unreached(error) from None
        except httpx.HTTPError as error:
            raise self._unreached(error) from None

    def _unreached(self, error: httpx.HTTPError) -> UserError:
        return UserError(f"the SuperNode at {self.address} cannot be reached: {one_line(error)}; it is tried again")

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        """The task of ``token``, kept alive until the end. Raises :class:`UserError` where it cannot be taken."""
        client = self._connect(RuntimeTokenHttpInterceptor(token), _PATIENCE)
        beats = HeartbeatSender(_heartbeat(client))
        beats.start()
        try:
            yield _taken(client)
        finally:
            beats.stop()
            client.close()


def _taken(client: RuntimeHttpClient) -> Task:
    """The task that ``client`` has the token of."""
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        pulled = client.PullMessages(PullAppMessagesRequest())
        (packed,), (objects,) = pulled.messages_list, pulled.message_object_trees
        context, envelope = context_from_proto(given.context), message_from_proto(packed)
    except Exception as error:  # every way in which a connection breaks, or a SuperNode says that the task is over
        # Not said to have failed: Flower's SuperNode then waits for an answer for ever, and else for its patience.
        raise UserError(f"an instruction cannot be taken from the SuperNode: {one_line(error)}") from None
    # What Flower's messages say of who made them.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, context.run_id, context.node_id
    envelope.metadata.__dict__["_message_id"] = objects.object_id
    return Task(envelope, context, given.fab.content, objects, client)


def _heartbeat(client: RuntimeHttpClient) -> Callable[[], bool]:
    request = SendTaskHeartbeatRequest()

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(request)
        except httpx.TransportError:
            return False
        except httpx.HTTPError:
            # The task is over for the SuperNode: handing the answer in will say so.
            return True
        return True

    return beat
