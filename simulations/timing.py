"""Where the time of a run goes, round by round: measured with `--profile`, kept in profile.json, shown as a table."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..client.resident import wait
from ..core.errors import UserError
from ..core.profile import SECTIONS, Profile, profiling
from ..core.progress import Passing, Watch
from ..server.files import write_json
from ..server.rundir import read_profile
from .choice import Choice

#: What was in no section.
REST = "rest"


class Timed(Passing):
    """Passes the events of a run on to ``watch``, and tells the rounds of its ``profile`` apart.

    Every second belongs to one round, from the start of its training to the start of the next; what comes before the
    first (loading, joining, the first evaluation) to round 0, or to the round that a resumed run goes on from.
    """

    def __init__(self, watch: Watch, profile: Profile, folder: Path, choice: Choice) -> None:
        super().__init__(watch)
        self._rounds: list[dict[str, Any]] = []
        self._last = 0
        self._profile, self._folder, self._choice = profile, folder, choice
        self._began = time.perf_counter()
        self._round: int | None = None
        self._trainings = 0

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self._round, self._last = first_round - 1, rounds
        super().run_started(first_round=first_round, rounds=rounds, sites=sites)

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        if round != self._round:
            self.close()
            self._round = round
        super().phase_started(kind, round, sites)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train":
            self._trainings += len(record["sites"])
        elif record["round"] == self._last:
            # The report that ends the run shows it too.
            self.close()
            self.write()
        super().phase_finished(record)

    def close(self) -> None:
        """End the round at hand."""
        now = time.perf_counter()
        number, sections = self._round or 0, self._profile.taken()
        if not self._rounds or self._rounds[-1]["round"] != number:
            self._rounds.append({"round": number, "seconds": 0.0, "trainings": 0, "sections": {}})
        row = self._rounds[-1]
        row["seconds"] += now - self._began
        row["trainings"] += self._trainings
        for name, spent in sections.items():
            known = row["sections"].setdefault(name, {"seconds": 0.0, "calls": 0})
            for key in known:
                known[key] += spent[key]
        self._began, self._trainings = now, 0

    def write(self) -> None:
        """Keep what was measured in profile.json."""
        write_json(self._folder / "profile.json", summed(self._rounds, self._choice.engine, self._choice.workers))


@contextmanager
def timed(watch: Watch, folder: Path, choice: Choice) -> Generator[Watch]:
    """Measure the run within, and keep it in profile.json, however it ends. Gives what the run is to be watched by."""
    with profiling(Profile(wait)) as profile:
        rounds = Timed(watch, profile, folder, choice)
        try:
            yield rounds
        finally:
            rounds.close()
            if (folder / "run.json").exists():
                rounds.write()


def summed(rounds: Sequence[Mapping[str, Any]], engine: str, processes: int) -> dict[str, Any]:
    """What profile.json holds of ``rounds``: they, and all together; ``processes``: whose seconds are added up."""
    names = [name for name in SECTIONS if any(name in row["sections"] for row in rounds)]
    return {
        "schema": 1,
        "engine": engine,
        "processes": processes,
        "seconds": sum(row["seconds"] for row in rounds),
        "trainings": sum(row["trainings"] for row in rounds),
        "sections": {
            name: {
                key: sum(row["sections"].get(name, {}).get(key, 0) for row in rounds) for key in ("seconds", "calls")
            }
            for name in names
        },
        "rounds": list(rounds),
    }


def profile_table(profile: Mapping[str, Any]) -> Table:
    """One row a section: seconds, share of the wall time, and milliseconds of a site's training."""
    several = profile["processes"] > 1
    over = f", seconds added up over {profile['processes']} processes" if several else ""
    table = Table(title=Text(f"Where {profile['seconds']:.1f} s went{over}"))
    table.add_column("section")
    for head in ("seconds", "% of wall", "ms a site's round"):
        table.add_column(head, justify="right")
    rows = [(name, spent["seconds"]) for name, spent in profile["sections"].items()]
    if not several:
        rows.append((REST, rest(profile)))
    for name, seconds in rows:
        table.add_row(name, *_figures(seconds, profile))
    table.add_section()
    table.add_row("wall", *_figures(profile["seconds"], profile), style="bold")
    return table


def _figures(seconds: float, profile: Mapping[str, Any]) -> tuple[str, str, str]:
    each = f"{1000 * seconds / profile['trainings']:.2f}" if profile["trainings"] else "–"
    return f"{seconds:.2f}", f"{100 * seconds / max(profile['seconds'], 1e-9):.1f}", each


def rounds_table(profile: Mapping[str, Any]) -> Table:
    """One row a round, with the seconds of each section."""
    names = list(profile["sections"])
    several = profile["processes"] > 1
    table = Table(title=Text("Seconds by round"))
    for head in ("round", *names, *(() if several else (REST,)), "wall"):
        table.add_column(head, justify="right")
    for row in profile["rounds"]:
        spent = [row["sections"].get(name, {}).get("seconds", 0.0) for name in names]
        spent += [] if several else [rest(row)]
        table.add_row(str(row["round"]), *(f"{seconds:.2f}" for seconds in (*spent, row["seconds"])))
    return table


def rest(timed: Mapping[str, Any]) -> float:
    """Seconds of a round, or of a whole profile, that were in no section; for one process alone."""
    return max(0.0, timed["seconds"] - sum(spent["seconds"] for spent in timed["sections"].values()))


def profile_of(folder: Path) -> dict[str, Any]:
    """profile.json of a run. Raises :class:`UserError` when the run was not profiled."""
    found = read_profile(folder)
    if found is None:
        raise UserError(f"{folder}: holds no profile.json; run it with --profile")
    return found
