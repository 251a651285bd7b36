"""A SuperNode's runtime interface, as much of it as a site's worker needs: take a task, its message, and answer.

`flower-superexec` and `flwr-clientapp` speak the same interface, the one to start the other, which unpacks the app
bundle and runs what lies in it; a worker in their place runs nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from ...core.errors import UserError, one_line

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
#: Seconds for which a connection that broke is tried again.
_PATIENCE = 60.0
_TURNED_AWAY = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
_MEND = "start it with --isolation process, and both with one --superexec-auth-secret-file"


class StrangerError(UserError):
    """SuperNode and worker do not know each other: there is nothing to wait for."""


@dataclass
class Task:
    """A message that waits for its answer, and the bundle that came with the run."""

    message: Message
    context: Context
    bundle: bytes
    _client: RuntimeHttpClient

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
        """The task of ``token``, kept alive until the end. Raises :class:`UserError` where it cannot be read."""
        client = self._connect(RuntimeTokenHttpInterceptor(token), _PATIENCE)
        beats = HeartbeatSender(_heartbeat(client))
        beats.start()
        try:
            try:
                message, context, _, bundle = pull_task_input(client)
            except Exception as error:  # a message as the other end made it, and every way in which a connection breaks
                push_task_output(client, None, SubStatus.FAILED, "the message cannot be read")
                raise UserError(f"an instruction cannot be taken from the SuperNode: {one_line(error)}") from None
            yield Task(message, context, bundle.content, client)
        finally:
            beats.stop()
            client.close()


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
