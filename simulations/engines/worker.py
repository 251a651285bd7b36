"""A worker of the engine `workers`: a process that holds the base model and serves some of the sites, all rounds long.

`python -m fedgraft.simulations.engines.worker CONFIG FD...` serves a run over each of the inherited sockets. What is
the same for all workers of a machine, the libraries and the sites' records, is loaded once, before the process is
divided; the base model's file is mapped, so that its pages are shared too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ...client.cohort import Cohort
from ...client.devicememory import share_device
from ...client.resident import wait
from ...core.config import config_from_json
from ...core.errors import UserError
from ...core.profile import Profile, profiling
from ...core.progress import Watch
from ...core.wire import no_answer
from ..scenario import complete, site_data
from ..sites import SimulatedSites
from .channel import Channel, Closed, from_bytes, to_bytes

#: Seconds between two reports of what the sites do.
_EVERY = 0.1
_LOST = 1


class Relay(Watch):
    """Tells the server what the sites do: the steps now and then, what a person should read at once."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._events: list[tuple[str, list[Any]]] = []
        self._told = time.monotonic()

    def note(self, text: str) -> None:
        self._add("note", text)
        self._send()

    def smaller_batch(self, site: str, setting: str, size: int, text: str) -> None:
        self._add("smaller_batch", site, setting, size, text)

    def cohort_found(self, size: int, text: str) -> None:
        self._add("cohort_found", size, text)

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        self._add("site_step", site, step, steps, loss, epsilon)

    def site_finished(self, kind: str, site: str) -> None:
        self._add("site_finished", kind, site)

    def taken(self) -> list[tuple[str, list[Any]]]:
        """What has not been told yet."""
        events, self._events, self._told = self._events, [], time.monotonic()
        return events

    def _add(self, event: str, *values: Any) -> None:
        self._events.append((event, list(values)))
        if time.monotonic() - self._told > _EVERY:
            self._send()

    def _send(self) -> None:
        self._channel.send({"is": "events", "events": self.taken()})


class Worker:
    """The sites that a server sends to this process."""

    def __init__(self, channel: Channel, head: Mapping[str, Any]) -> None:
        self._channel = channel
        self._relay = Relay(channel)
        self._cohort = Cohort(head["cohort"])
        self._client = SimulatedSites(lambda context: Path(head["folder"]), self._relay, self._cohort)
        self._profile = Profile(wait) if head["profile"] else None
        self._sites: int = head["sites"]
        self._contexts: dict[int, Context] = {}
        # Records that instructions have in common, by the number that the server gave them.
        self._common: dict[int, RecordDict] = {}

    def answer(self, head: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """Answer the instructions of a message, all of one kind."""
        for number in head["forget"]:
            del self._common[number]
        own, common = parts[: len(head["sites"])], parts[len(head["sites"]) :]
        self._common |= {number: from_bytes(part) for number, part in zip(head["common"], common, strict=True)}
        calls = []
        for (node, partition, number), part in zip(head["sites"], own, strict=True):
            content = RecordDict({**from_bytes(part), **self._common[number]})
            message = Message(content, dst_node_id=node, message_type=head["type"], group_id=head["group"])
            calls.append((message, self._context(node, partition)))
        try:
            replies = self._answers(head["type"], calls)
        except Closed:
            raise
        except Exception as error:
            # As Flower and the engine `inprocess` do: the words of an exception may quote records.
            replies = [no_answer(message, "crashed", type(error).__name__) for message, _ in calls]
        errors = [[reply.error.code, reply.error.reason] if reply.has_error() else None for reply in replies]
        told = {"is": "answers", "number": head["number"], "errors": errors, "events": self._relay.taken()}
        told["cohort"] = self._cohort.most
        told["profile"] = self._profile.taken() if self._profile is not None else {}
        self._channel.send(told, [b"" if reply.has_error() else to_bytes(reply.content) for reply in replies])

    def _answers(self, kind: str, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        name: Any = kind.removeprefix("query.")
        if self._profile is None:
            return self._client.answer_together(name, calls)
        with profiling(self._profile):
            return self._client.answer_together(name, calls)

    def _context(self, node: int, partition: int) -> Context:
        if node not in self._contexts:
            place = {"partition-id": partition, "num-partitions": self._sites}
            self._contexts[node] = Context(
                run_id=1, node_id=node, node_config=dict(place), state=RecordDict(), run_config={}
            )
        return self._contexts[node]


def serve(channel: Channel) -> NoReturn:
    """Do what the server says until it says stop or is gone; then the process ends at once, whatever it is doing."""
    inbox: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]]] = queue.SimpleQueue()
    # Also takes in what the server sends while a site trains, so that neither waits for the other to read.
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    worker = None
    try:
        while True:
            head, parts = inbox.get()
            if head["is"] == "begin":
                torch.set_num_threads(head["threads"])
                if head["gpu"] is not None:
                    torch.cuda.set_device(head["gpu"])
                share_device(head["sharing"])
                worker = Worker(channel, head)
            elif worker is not None:
                worker.answer(head, parts)
    except Closed:
        os._exit(_LOST)


def _listen(channel: Channel, inbox: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]]]) -> None:
    while True:
        try:
            head, parts = channel.receive()
        except Closed:
            # A run that goes on without its server would spend privacy for nothing.
            os._exit(_LOST)
        if head["is"] == "stop":
            os._exit(0)
        inbox.put((head, parts))


def quiet() -> None:
    """As in the server's process: what a site logs reaches the terminal through the run's own messages."""
    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("fedgraft.site").addHandler(logging.NullHandler())
    logging.getLogger("fedgraft.site").propagate = False


def main() -> None:
    """Serve over the sockets that the arguments name, each in a process; say which ended how on standard output.

    The first argument is the file of the run's configuration.
    """
    quiet()
    # What a library prints must not be taken for that.
    report = os.dup(1)
    os.dup2(2, 1)
    # Threads of the arithmetic do not outlive a fork, and a child that waits for them would wait for ever.
    torch.set_num_threads(1)
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    with contextlib.suppress(UserError):  # each site says it in its answer
        site_data(complete(config_from_json(text, "the run's configuration")))
    ends = [int(argument) for argument in sys.argv[2:]]
    if len(ends) == 1:
        serve(Channel.of(socket.socket(fileno=ends[0])))
    gc.collect()
    gc.freeze()
    children = {}
    for end in ends:
        child = os.fork()
        if not child:
            for other in (report, *(set(ends) - {end})):
                os.close(other)
            serve(Channel.of(socket.socket(fileno=end)))
        children[child] = end
    for end in ends:
        os.close(end)
    while children:
        child, status = os.wait()
        with contextlib.suppress(BrokenPipeError):  # the server is gone
            os.write(report, json.dumps([children.pop(child), os.waitstatus_to_exitcode(status)]).encode() + b"\n")
    # Whoever made it may have been killed.
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)


if __name__ == "__main__":
    main()
