"""What the coordinator asks of its SuperLink, through Flower's own client of the control interface."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from flwr.cli.utils import flwr_cli_exc_handler
from flwr.common.constant import PUBLIC_KEY_ALREADY_IN_USE_MESSAGE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from ...core.errors import UserError
from ...deployment.kits import ServerKit

#: How Flower's own lines begin, in colour or not.
_FLOWERS = re.compile(r"(\x1b\[[0-9;]*m)*(INFO\s*(\x1b\[[0-9;]*m)*\s*:|Successfully installed fedgraft-job )")


@dataclass(frozen=True)
class Node:
    """A registered site: Flower's number for it, the name and public key it was registered with, its status."""

    id: int
    name: str
    public_key: str
    status: str


@dataclass(frozen=True)
class Run:
    """A job at the SuperLink."""

    id: int
    name: str
    status: str
    details: str
    began: str
    ended: str


def job_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of ``texts``, wherever those were cut, each with its end; what Flower says of itself is left out."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in lines if not _FLOWERS.match(line))
    if rest and not _FLOWERS.match(rest):
        yield rest


class TakenError(UserError):
    """A key that the SuperLink had let go before: it takes no key twice."""


class Control:
    """The control interface of the SuperLink on this machine."""

    def __init__(self, kit: ServerKit) -> None:
        host = kit.own_address
        self._where = f"{host}:{kit.settings.server.port}"
        self._client = ControlHttpClient.from_server_address(
            server_address=f"[{host}]:{kit.settings.server.port}" if ":" in host else self._where,
            insecure=False,
            root_certificates=(kit.folder / "ca.crt").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """All sites that are registered."""
        with self._errors():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(n.node_id, n.name, n.public_key.decode(), n.status) for n in found if n.status != "unregistered"]

    def register(self, name: str, public_key: str) -> int:
        """Let the site with this key connect; returns Flower's number for it. Raises :class:`TakenError`."""
        try:
            with self._errors():
                return self._client.RegisterNode(RegisterNodeRequest(public_key=public_key.encode(), name=name)).node_id
        except UserError as error:
            if PUBLIC_KEY_ALREADY_IN_USE_MESSAGE not in str(error):
                raise
            raise TakenError(
                f"{name}: its key was let go before, and Flower takes none twice; run: fedgraft provision rotate "
                f"{name}, and at the site: fedgraft site init --new-key"
            ) from None

    def unregister(self, node: int) -> None:
        """Let the site connect no more."""
        with self._errors():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def submit(self, bundle: Fab, settings: dict[str, str]) -> int:
        """Start a run; returns its number."""
        request = StartRunRequest(fab=fab_to_proto(bundle), override_config=user_config_to_proto(dict(settings)))
        with self._errors():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise UserError(f"{self._where}: the SuperLink did not start the run; its log says more")
        return int(answer.run_id)

    def runs(self) -> list[Run]:
        """All runs, the oldest first."""
        with self._errors():
            found = self._client.ListRuns(ListRunsRequest()).run_dict
        runs = []
        for number, run in found.items():
            status = run.status.sub_status or run.status.status
            name = run.override_config["output"].string if "output" in run.override_config else ""
            runs.append(
                (run.pending_at, Run(number, name, status, run.status.details, run.pending_at, run.finished_at))
            )
        return [run for _, run in sorted(runs, key=lambda entry: (entry[0], entry[1].id))]

    def stop(self, run: int) -> None:
        """End a run."""
        with self._errors():
            done = self._client.StopRun(StopRunRequest(run_id=run)).success
        if not done:
            raise UserError(f"run {run} could not be stopped; is it over?")

    def logs(self, run: int, *, follow: bool) -> Iterator[str]:
        """The lines of a run's ServerApp, without Flower's own INFO; with ``follow``, until it is over."""
        return job_lines(self._logs(run, follow=follow))

    def _logs(self, run: int, *, follow: bool) -> Iterator[str]:
        with self._errors():
            for answer in self._client.StreamLogs(StreamLogsRequest(run_id=run, after_timestamp=0.0)):
                yield answer.log_output
                if not follow:
                    return

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with flwr_cli_exc_handler():
                yield
        except click.ClickException as error:
            text = error.format_message()
            if "Connection to the SuperLink is unavailable" in text:
                text = "the server does not answer; is it started? (fedgraft server start)"
            raise UserError(f"{self._where}: {text}") from None
