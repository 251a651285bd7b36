"""What came of the runs of a sweep: one row a run, read from its directory, and what the seeds say together."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...server.files import write_text
from ...server.rundir import read_metrics, read_run
from .plan import Planned, Sweep
from .statistics import Estimate, estimate

SCHEMA = 1
#: What is estimated over seeds, by column; and which way is better, where one is.
MEASURES: Mapping[str, str] = {
    "accuracy_before": "",
    "accuracy": "high",
    "worst_site_accuracy": "high",
    "loss": "low",
    "epsilon": "",
    "bytes_up_site": "low",
    "seconds": "low",
    "virtual_seconds": "low",
}


@dataclass(frozen=True)
class Curve:
    """Of one run: accuracy after each evaluated round, and the bytes that a site had sent in training by then."""

    rounds: tuple[int, ...]
    accuracy: tuple[float, ...]
    sent: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """The runs of a sweep that differ in their seed alone; ``promise``: the epsilon promised, None: no privacy."""

    values: tuple[tuple[str, str], ...]
    baseline: str
    promise: float | None
    estimates: Mapping[str, Estimate]
    seeds: int
    finished: int
    refused: str
    curves: tuple[Curve, ...]

    @property
    def text(self) -> str:
        parts = [f"{self.baseline} (baseline)"] if self.baseline else []
        return ", ".join([*parts, *(f"{key}={value}" for key, value in self.values)]) or "all"


def row(run: Planned, folder: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The row of one run in `results.csv`; numbers that are not known are None."""
    found: dict[str, Any] = {
        **dict(run.point.values),
        "baseline": run.point.baseline,
        "seed": run.point.seed,
        "status": "refused" if run.refused else "waiting",
        "error": run.refused or failed.get(run.name, ""),
        **measured(folder, None),
        "path": str(folder),
    }
    if not run.refused and (folder / "run.json").exists():
        told = read_run(folder)
        status = told["status"]
        found |= {"status": status, **measured(folder, told)}
        if status == "failed" and not found["error"]:
            found["error"] = told["error"]
    if found["status"] != "finished" and run.name in failed:
        found["status"] = "failed"
    return found


def measured(folder: Path, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers of a run in the columns of `results.csv`; all None where there is none."""
    if run is None:
        return dict.fromkeys((*MEASURES, "bytes_up", "bytes_down", "engine", "digest"))
    sites = run["sites"].values()
    accuracies = [site["accuracy"] for site in sites if site["accuracy"] is not None]
    spent = [site["epsilon"] for site in sites if site["epsilon"] is not None]
    one = len(sites) == 1 and bool(run["config"].get("simulation", {}).get("pooled"))
    return {
        "accuracy_before": run["accuracy"]["before"],
        "accuracy": run["accuracy"]["after"],
        # Who holds the records of all has no worst site, and nobody to send to.
        "worst_site_accuracy": None if one else min(accuracies, default=None),
        "loss": run["loss"]["after"],
        "epsilon": max(spent, default=None),
        "bytes_up_site": None if one else run["bytes_up"] / len(sites),
        "seconds": run["seconds"],
        "virtual_seconds": (run.get("virtual") or {}).get("seconds"),
        "bytes_up": run["bytes_up"],
        "bytes_down": run["bytes_down"],
        "engine": run["engine"],
        "digest": run["digest"],
    }


def curve(folder: Path) -> Curve:
    """Accuracy against rounds and bytes, of a run that may still be going on."""
    rounds, accuracy, sent, so_far = [], [], [], 0.0
    for line in read_metrics(folder):
        if line["kind"] == "train":
            so_far += line["bytes_up"] / max(1, len(line["sites"]))
        elif line.get("accuracy") is not None:
            rounds.append(int(line["round"]))
            accuracy.append(float(line["accuracy"]))
            sent.append(so_far)
    return Curve(tuple(rounds), tuple(accuracy), tuple(sent))


@dataclass(frozen=True)
class Results:
    """All rows of a sweep, and the groups that they make."""

    name: str
    keys: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    groups: tuple[Group, ...]

    @classmethod
    def gather(cls, sweep: Sweep, folder: Path, failed: Mapping[str, str]) -> Results:
        """From the run directories under ``folder``; ``failed``: what went wrong with a run, by name."""
        rows = {run.name: row(run, folder / "runs" / run.name, failed) for run in sweep.runs}
        alike: dict[tuple[tuple[str, str], ...], list[Planned]] = {}
        # Baselines come last, as what the others are held against.
        for run in sorted(sweep.runs, key=lambda run: bool(run.point.baseline)):
            alike.setdefault(run.point.group, []).append(run)
        groups = [_group(runs, [rows[run.name] for run in runs]) for runs in alike.values()]
        return cls(sweep.name, sweep.keys, tuple(rows.values()), tuple(groups))

    def write(self, folder: Path) -> None:
        """Write `results.csv` and `results.json`. Raises :class:`UserError` when the disk is full or read-only."""
        columns = [*self.keys, "baseline", "seed", "status", *measured(folder, None), "path", "error"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / "results.csv", text.getvalue())
        groups = [
            {
                **dict(group.values),
                "baseline": group.baseline,
                "seeds": group.seeds,
                "finished": group.finished,
                "refused": group.refused,
                **{
                    name: {
                        "mean": e.mean,
                        "low": e.low if e.half is not None else None,
                        "high": e.high if e.half is not None else None,
                        "n": e.count,
                    }
                    for name, e in group.estimates.items()
                },
            }
            for group in self.groups
        ]
        told = {"schema": SCHEMA, "name": self.name, "keys": list(self.keys), "rows": list(self.rows), "groups": groups}
        write_text(folder / "results.json", json.dumps(told, indent=2) + "\n")

    def best(self, measure: str, group: Group) -> bool:
        """Whether ``group`` is the best in ``measure``, with an interval that meets no other's.

        It is held against the federations that promise as much: more noise is no worse, and a baseline is no rival.
        """
        way, own = MEASURES[measure], group.estimates.get(measure)
        if not way or own is None or group.baseline:
            return False
        others = [other for other in self.groups if other is not group and not other.baseline]
        alike = [other.estimates for other in others if other.promise == group.promise]
        rivals = [estimates[measure] for estimates in alike if measure in estimates]
        better = all(own.mean > rival.mean if way == "high" else own.mean < rival.mean for rival in rivals)
        return bool(rivals) and better and all(own.apart(rival) for rival in rivals)


def _group(runs: Sequence[Planned], rows: Sequence[Mapping[str, Any]]) -> Group:
    done = [found for found in rows if found["status"] == "finished"]
    estimates = {name: estimate(found[name] for found in done) for name in MEASURES}
    privacy = runs[0].config.privacy
    curves = [curve(Path(found["path"])) for found in done]
    return Group(
        values=runs[0].point.values,
        baseline=runs[0].point.baseline,
        promise=privacy.epsilon if privacy.enabled else None,
        estimates={name: found for name, found in estimates.items() if found is not None},
        seeds=len(runs),
        finished=len(done),
        refused=next((run.refused for run in runs if run.refused), ""),
        curves=tuple(found for found in curves if found.rounds),
    )


def require_run(folder: Path) -> dict[str, Any]:
    """The run.json in ``folder``. Raises :class:`UserError` in one line, with the mend."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory")
    if (folder / "sweep.json").exists():
        raise UserError(f"{folder}: is a sweep; name runs of it, such as {folder}/runs/*")
    return read_run(folder)
