"""A Flower Grid over several processes, each with a resident base model that serves its sites all rounds long.

Every site belongs to one worker, by its load, so that what the worker keeps of it is used again. What the sites of a
round are told alike (the global adapter) goes to each worker once. Answers are handed on in the order of the
instructions, which is that of the sites' names: the server adds up the same numbers in the same order as under the
engine `inprocess`, so the result has the same bits. Workers that summed up beforehand would give that up for some bytes
within the machine. Only so many sites are asked ahead of the one whose turn it is, so that memory does not grow with
them.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict

from ...client.cohort import Cohort
from ...core.errors import UserError
from ...core.profile import Profile
from ...core.progress import SILENT, Watch
from ...core.wire import no_answer
from . import torchrun
from .channel import Closed, from_bytes, to_bytes
from .local import FIRST_NODE, LocalGrid
from .pool import Member, Pool

#: Messages that a worker has at a time: one that it answers, and one so that it need not wait for the server.
_AHEAD = 2
#: What a worker keeps of the records that instructions have in common: those of each rank or role.
_KEEP = 8
_WINDOW = 16


@dataclass(frozen=True)
class _Asked:
    """An instruction; ``turn``: the exchange that it belongs to; ``place``: its place in the order of answers there."""

    turn: int
    place: int
    message: Message


@dataclass
class _Worker:
    """A worker: what waits to be sent to it, what it has been given, and which common records it holds."""

    number: int
    member: Member
    cohort: int
    queue: deque[_Asked] = field(default_factory=deque)
    given: dict[int, list[_Asked]] = field(default_factory=dict)
    holds: OrderedDict[tuple[int, ...], tuple[int, RecordDict]] = field(default_factory=OrderedDict)


class WorkersGrid(LocalGrid):
    """As many nodes as ``loads`` has entries, served by the workers of ``pool``.

    ``loads``: the arithmetic of each site, in any unit; ``folder``: the run directory; ``cohort``: sites that a worker
    answers together, 0: as many as it finds to pay. A worker that dies takes with it the answers that it owes, which
    become errors that say why; from then on the others serve its sites. Raises :class:`UserError` when none is left.
    """

    def __init__(
        self,
        pool: Pool,
        loads: Sequence[float],
        folder: Path,
        *,
        cohort: int = 1,
        profile: Profile | None = None,
        watch: Watch = SILENT,
    ) -> None:
        super().__init__(len(loads))
        most = Cohort(cohort).most
        self._workers = [_Worker(number, member, most) for number, member in enumerate(pool.members, 1)]
        self._living = list(self._workers)
        self._loads = list(loads)
        self._owner = [self._workers[owner] for owner in shares(self._loads, len(self._workers))]
        self._window = max(_WINDOW, len(self._workers) * most * (_AHEAD + 1))
        self._profile = profile
        self._watch = watch
        self._turn = self._sent = self._commons = 0
        self._ready: dict[int, Message] = {}
        self._pushed: dict[str, Message] = {}
        begin = {"is": "begin", "folder": str(folder), "sites": len(loads), "threads": pool.threads, "cohort": cohort}
        for worker in self._workers:
            gpu = worker.member.gpu
            own = {"profile": profile is not None, "gpu": gpu, "sharing": self._sharing(gpu)}
            self._send(worker, begin | own)

    def _sharing(self, gpu: int | None) -> int:
        """How many workers plan with the same memory, that of a GPU or of a machine."""
        if torchrun.ranks():
            return torchrun.here(len(self._workers)) if gpu is None else 1
        return sum(worker.member.gpu == gpu for worker in self._workers)

    # Flower's Grid

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = {uuid.uuid4().hex: message for message in messages}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._pushed.pop(identity) for identity in message_ids if identity in self._pushed]
        return list(self.send_and_receive(found))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Answers in the order of ``messages``; one that is not there after ``timeout`` seconds is never given.

        Instructions are taken from ``messages`` as workers have use for them.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._turn += 1
        self._ready = {}
        for worker in self._living:
            worker.queue.clear()
        pending = enumerate(messages)
        place, taken, more = 0, 0, True
        while True:
            while more and taken - place < self._window:
                number, message = next(pending, (-1, None))
                more = message is not None
                if message is not None:
                    self._owner_of(message).queue.append(_Asked(self._turn, number, message))
                    taken += 1
            self._listen(0)
            self._give(last=not more)
            while place not in self._ready and place < taken:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._listen(None if left == math.inf else left)
                self._give(last=not more)
            if place == taken:
                return
            yield self._ready.pop(place)
            place += 1

    # Workers

    def _owner_of(self, message: Message) -> _Worker:
        return self._owner[message.metadata.dst_node_id - FIRST_NODE - 1]

    def _give(self, *, last: bool) -> None:
        """Send what waits, in cohorts; ``last``: nothing will join it. An idle worker gets what there is."""
        for worker in list(self._living):
            while worker.queue and len(worker.given) < _AHEAD:
                if len(worker.queue) < worker.cohort and not last and worker.given:
                    break
                batch = [worker.queue.popleft() for _ in range(min(worker.cohort, len(worker.queue)))]
                self._instruct(worker, batch)

    def _instruct(self, worker: _Worker, batch: list[_Asked]) -> None:
        """Send instructions of one exchange; what they have in common goes once to a worker, while it is in use."""
        own, common, fresh, sites = [], [], [], []
        for asked in batch:
            content = asked.message.content
            shared = RecordDict({name: record for name, record in content.items() if name != "job"})
            key = tuple(map(id, shared.values()))
            if key not in worker.holds:
                self._commons += 1
                # Held here too, or another record could come to lie where this one was.
                worker.holds[key] = (self._commons, shared)
                fresh.append(self._commons)
                common.append(to_bytes(shared))
            worker.holds.move_to_end(key)
            node = asked.message.metadata.dst_node_id
            sites.append([node, node - FIRST_NODE - 1, worker.holds[key][0]])
            own.append(to_bytes(RecordDict({"job": content["job"]})))
        forget = []
        while len(worker.holds) > max(_KEEP, len(batch)):
            forget.append(worker.holds.popitem(last=False)[1][0])
        first = batch[0].message.metadata
        self._sent += 1
        worker.given[self._sent] = batch
        head = {"is": "instructions", "number": self._sent, "type": first.message_type, "group": first.group_id}
        self._send(worker, {**head, "sites": sites, "common": fresh, "forget": forget}, [*own, *common])

    def _send(self, worker: _Worker, head: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        try:
            worker.member.channel.send(head, parts)
        except Closed:
            self._bury(worker)

    def _listen(self, timeout: float | None) -> None:
        """Wait until a worker says something, or ends."""
        speaking = {worker.member.channel.connection: worker for worker in self._living}
        for connection in wait(list(speaking), timeout):
            worker = speaking[connection]  # type: ignore[index]
            try:
                head, parts = worker.member.channel.receive()
            except Closed:
                self._bury(worker)
                continue
            for name, values in head["events"]:
                getattr(self._watch, name)(*values)
            if head["is"] == "answers":
                self._take(worker, head, parts)

    def _take(self, worker: _Worker, head: dict[str, Any], parts: list[bytes]) -> None:
        if self._profile is not None:
            for name, spent in head["profile"].items():
                self._profile.add(name, spent["seconds"], spent["calls"])
        worker.cohort = head["cohort"]
        batch = worker.given.pop(head["number"])
        for at, asked in enumerate(batch):
            if asked.turn != self._turn:
                continue  # too late: the exchange is over
            if head["errors"][at] is not None:
                self._ready[asked.place] = Message(Error(*head["errors"][at]), reply_to=asked.message)
            else:
                self._ready[asked.place] = Message(from_bytes(parts[at]), reply_to=asked.message)

    def _bury(self, worker: _Worker) -> None:
        """A worker has ended: what it owes is lost, what it was not given yet others take, and its sites with it."""
        if worker not in self._living:
            return
        self._living.remove(worker)
        worker.member.channel.close()
        why = f"worker {worker.number} of {len(self._workers)} {worker.member.why()}"
        for asked in (asked for batch in worker.given.values() for asked in batch if asked.turn == self._turn):
            self._ready[asked.place] = no_answer(asked.message, "crashed", why)
        if not self._living:
            raise UserError(f"no worker is left: {why}")
        self._watch.note(f"{why}; the others take over its sites")
        orphans = [site for site, owner in enumerate(self._owner) if owner is worker]
        for site, heir in zip(orphans, shares([self._loads[s] for s in orphans], len(self._living)), strict=True):
            self._owner[site] = self._living[heir]
        left, worker.queue = worker.queue, deque()
        for asked in left:
            self._owner_of(asked.message).queue.append(asked)


def shares(loads: Sequence[float], workers: int) -> list[int]:
    """The worker of each site: the heaviest first, each to the one with least to do (Graham 1969, LPT)."""
    owners, total = [0] * len(loads), [0.0] * workers
    for site in sorted(range(len(loads)), key=lambda site: -loads[site]):
        owners[site] = min(range(workers), key=total.__getitem__)
        total[owners[site]] += loads[site]
    return owners
