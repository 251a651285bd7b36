"""The server of a kit as it is now: which sites it sees, and where its latest job is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import UserError, one_line
from ...deployment.kits import ServerKit
from ..deployed.control import Control, Run
from .snapshot import RunReader, RunView, SiteView


@dataclass(frozen=True)
class KitView:
    """``trouble``: why the server cannot be asked; ``sites``: whether each registered one is connected, by name."""

    federation: str
    trouble: str
    sites: dict[str, bool]
    job: RunView | None


class KitReader:
    """Looks at the server of ``kit`` again and again; Flower's control interface is asked for sites and jobs."""

    def __init__(self, kit: ServerKit) -> None:
        self.kit = kit
        self._control: Control | None = None
        self._reader: RunReader | None = None

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
        return KitView(self.kit.settings.federation, trouble, sites, job)

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    def _job(self, told: Run | None) -> RunView | None:
        folder = self.kit.runs / told.name if told is not None else _latest(self.kit.runs)
        if folder is None:
            return None
        if self._reader is None or self._reader.folder != folder:
            self._reader = RunReader(folder)
        view = self._reader.look()
        if told is not None and view.status == "absent":
            # It waits for its process, or ended before it had written anything.
            return replace(view, status=told.status, error=told.details)
        return view


def _seen(site: SiteView, connected: dict[str, bool], silent: bool) -> SiteView:
    return site if silent else replace(site, connected=connected.get(site.name, False))


def _latest(runs: Path) -> Path | None:
    """The run that was written to last."""
    times = {}
    for folder in runs.glob("*/"):
        written = [path.stat().st_mtime for path in (folder / "run.json", folder / "progress.json") if path.exists()]
        if written:
            times[folder] = max(written)
    return max(times, key=lambda folder: times[folder]) if times else None
