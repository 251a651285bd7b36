"""The server of a kit as it is now: which sites it sees, and where its latest job is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ...core.errors import UserError, one_line
from ...core.watching.follow import Follower
from ...core.watching.screen import moment, plain
from ...deployment.kits import ServerKit
from ...privacy.auditlog import FILE as AUDIT_LOG
from ..deployed.control import Control, Run
from .snapshot import RunReader, RunView, SiteView


@dataclass(frozen=True)
class KitView:
    """``trouble``: why the server cannot be asked; ``sites``: whether each registered one is connected, by name.

    ``refused``: by reason, whom the server turned away, by its audit log; ``last_refused``: when, and from where.
    """

    federation: str
    trouble: str
    sites: dict[str, bool]
    job: RunView | None
    refused: Mapping[str, int] = field(default_factory=dict)
    last_refused: tuple[datetime | None, str] = (None, "")


class KitReader:
    """Looks at the server of ``kit`` again and again; Flower's control interface is asked for sites and jobs."""

    def __init__(self, kit: ServerKit) -> None:
        self.kit = kit
        self._control: Control | None = None
        self._reader: RunReader | None = None
        self._lines = Follower(kit.state / AUDIT_LOG)
        self._begun = 0
        self._refused: Counter[str] = Counter()
        self._last: tuple[datetime | None, str] = (None, "")

    def look(self) -> KitView:
        """The server as it is now; where it does not answer, what its files say."""
        trouble, sites, told = "", {}, None
        try:
            self._control = self._control or Control(self.kit)
            sites = {node.name: node.status == "online" for node in self._control.nodes()}
            told = next((run for run in reversed(self._control.runs()) if run.name), None)
        except UserError as error:
            trouble = one_line(error)
        job = self._job(told)
        if job is not None:
            job = replace(job, sites=tuple(_seen(site, sites, bool(trouble)) for site in job.sites))
        self._read_refusals()
        return KitView(self.kit.settings.federation, trouble, sites, job, dict(self._refused), self._last)

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    def _read_refusals(self) -> None:
        new = self._lines.new()
        if self._lines.begun != self._begun:
            self._begun = self._lines.begun
            self._refused.clear()
        for line in new:
            if line.get("event") == "refused":
                self._refused[plain(line.get("why", ""))] += 1
                self._last = (moment(line.get("time")), plain(line.get("address", "")))

    def _job(self, told: Run | None) -> RunView | None:
        folder = self.kit.runs / told.name if told is not None else _latest(self.kit.runs)
        if folder is None:
            return None
        if self._reader is None or self._reader.folder != folder:
            self._reader = RunReader(folder)
        view = replace(self._reader.look(), name=folder.name)
        if told is not None and view.status == "absent":
            # It waits for its process, or ended before it had written anything.
            return replace(view, status=told.status, error=plain(told.details, 1000))
        return view


def _seen(site: SiteView, connected: dict[str, bool], silent: bool) -> SiteView:
    return site if silent else replace(site, connected=connected.get(site.name, False))


def _latest(runs: Path) -> Path | None:
    """The run that was written to last."""
    return max(runs.glob("*/"), key=lambda folder: folder.stat().st_mtime, default=None)
