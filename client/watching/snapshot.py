"""What a site's own files say of it: whether its worker serves, what it was asked, what left, what is left to spend."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import psutil

from ...core.errors import UserError, one_line
from ...core.watching.follow import Follower
from ...core.watching.screen import moment, plain
from ...core.wire import Kind
from ...deployment.kits import SiteKit
from ...privacy.auditlog import FILE
from ...privacy.ledger import Ledger, Limit
from ..policy import Dataset, Policy, load_policy
from ..warm.worker import LOCK

#: Instructions that there are; a server can make up names of others without end.
_KINDS = (*get_args(Kind), "start")
#: So many of the last refusals are kept.
_REFUSALS = 5
#: So much of the SuperNode's log tells whether it reaches the server.
_TAIL = 1 << 15
_CONNECTED = ("SuperNode ID", "Connection successful", "Received successfully", "Sent successfully", "Receiving:")
_AWAY = ("Connection attempt failed", "Starting Flower SuperNode", "SuperNode terminated", "Application shutdown")


@dataclass(frozen=True)
class Line:
    """A line of the audit log, as people want to know it: ``event`` is refused or left.

    ``why``: of a refusal, in words; ``reason``: ``policy`` where a line of the policy forbids, else ``other``.
    """

    time: datetime | None
    event: str
    kind: str
    run: str
    round: int
    why: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Budget:
    """What was spent on ``dataset`` of what the policy's line allows, in all or this calendar year (``year``).

    ``trouble``: why the ledger does not say, if so.
    """

    dataset: str
    allowed: float
    delta: float
    year: bool
    spent: float = 0.0
    trouble: str = ""

    @property
    def left(self) -> float:
        return max(0.0, self.allowed - self.spent)


@dataclass(frozen=True)
class SiteView:
    """A site: ``worker``: the number of its worker's process, 0 where none serves.

    ``connected``: by the SuperNode's log, None where it says nothing; ``answered``: answers by kind of instruction;
    ``refused``: refusals by kind and reason; ``trouble``: what is wrong with the policy.
    """

    name: str
    federation: str
    worker: int = 0
    connected: bool | None = None
    trouble: str = ""
    last: Line | None = None
    answered: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    refusals: tuple[Line, ...] = ()
    bytes_out: int = 0
    budgets: tuple[Budget, ...] = ()
    disk_free: int = 0


class SiteReader:
    """Looks at the kit of a site again and again; each look reads only what was added."""

    def __init__(self, kit: SiteKit) -> None:
        self.kit = kit
        self._lines = Follower(kit.state / FILE)
        self._ledgers: dict[str, Ledger] = {}
        self._begun = 0
        self._forget()

    def _forget(self) -> None:
        self._answered: Counter[str] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._refusals: list[Line] = []
        self._last: Line | None = None
        self._bytes = 0

    def look(self) -> SiteView:
        """The site as it is now."""
        new = self._lines.new()
        if self._lines.begun != self._begun:
            self._begun = self._lines.begun
            self._forget()
        for line in new:
            self._add(line)
        trouble, budgets = "", tuple[Budget, ...]()
        try:
            budgets = self._budgets(load_policy(self.kit.policy))
        except UserError as error:
            trouble = one_line(error)
        worker = _worker(self.kit.state / LOCK)
        return SiteView(
            self.kit.name,
            self.kit.settings.federation,
            worker=worker,
            connected=_connected(self.kit.folder / "logs" / "supernode.log") if worker else None,
            trouble=trouble,
            last=self._last,
            answered=dict(self._answered),
            refused=dict(self._refused),
            refusals=tuple(self._refusals),
            bytes_out=self._bytes,
            budgets=budgets,
            disk_free=shutil.disk_usage(self.kit.folder).free,
        )

    def _add(self, line: Mapping[str, Any]) -> None:
        event = line.get("event")
        if event not in ("refused", "left"):
            return
        number = line.get("round")
        found = Line(
            moment(line.get("time")),
            event,
            str(line.get("kind")) if line.get("kind") in _KINDS else "other",
            plain(line.get("run", ""), 40),
            number if isinstance(number, int) else 0,
            plain(line.get("why", ""), 1000),
            "policy" if "rule" in line else "other",
        )
        self._last = found
        if event == "left":
            self._answered[found.kind] += 1
            self._bytes += int(line.get("bytes", 0))
        else:
            self._refused[found.kind, found.reason] += 1
            self._refusals = [*self._refusals, found][-_REFUSALS:]

    def _budgets(self, policy: Policy) -> tuple[Budget, ...]:
        return tuple(self._budget(dataset, limit) for dataset in policy.datasets for limit in policy.limits(dataset))

    def _budget(self, dataset: Dataset, limit: Limit) -> Budget:
        folder = self.kit.state / "ledgers"
        ledger = self._ledgers.setdefault(dataset.name, Ledger(folder, dataset=dataset.name))
        spent, trouble = 0.0, ""
        try:
            if entries := ledger.entries():
                year = datetime.now(UTC).year if limit.year else 0
                # Under the split in force now; what was spent under another one adds up.
                about = (limit.delta, entries[-1].split)
                spent = ledger.total(*about, neighbours=limit.neighbours, accountant=limit.accountant, year=year)
        except UserError as error:
            trouble = one_line(error)
        return Budget(dataset.name, limit.epsilon, limit.delta, limit.year, spent, trouble)


def _worker(lock: Path) -> int:
    """The process that serves the site, 0 for none: the lock's file names the last one, which may be gone."""
    try:
        number = int(lock.read_text(encoding="utf-8"))
        return number if "fedgraft.client.warm" in psutil.Process(number).cmdline() else 0
    except (OSError, ValueError, psutil.Error):
        return 0


def _connected(log: Path) -> bool | None:
    """Whether the SuperNode reaches the server, by what it said last of that; None where it said nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    for line in reversed(text.splitlines()):
        if any(said in line for said in _AWAY):
            return False
        if any(said in line for said in _CONNECTED):
            return True
    return None
