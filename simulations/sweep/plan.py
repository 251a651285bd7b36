"""What a sweep is to run: every point with its whole configuration, as `sweep.json` keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.config import RunConfig, config_from_json
from ...core.errors import UserError
from ...server.files import write_json
from ..baselines import BASELINES, matters
from ..scenario import load_scenario
from .checking import require_startable
from .grid import Axis, Point, points

FILE = "sweep.json"
SCHEMA = 1


@dataclass(frozen=True)
class Planned:
    """One run: where it stands in the grid, its configuration, and why it cannot run (empty where it can)."""

    point: Point
    config: RunConfig
    refused: str = ""

    @property
    def name(self) -> str:
        return self.point.name


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, in the order in which they begin; ``keys``: those of its grid."""

    name: str
    keys: tuple[str, ...]
    runs: tuple[Planned, ...]

    def write(self, folder: Path) -> None:
        """Write `sweep.json`. Raises :class:`UserError` when the disk is full or read-only."""
        runs = [
            {
                "name": run.name,
                "values": dict(run.point.values),
                "baseline": run.point.baseline,
                "seed": run.point.seed,
                "refused": run.refused,
                "config_digest": run.config.digest(),
                "config": run.config.model_dump(mode="json"),
            }
            for run in self.runs
        ]
        write_json(folder / FILE, {"schema": SCHEMA, "name": self.name, "keys": list(self.keys), "runs": runs})

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep in ``folder``. Raises :class:`UserError` where there is none, or it was changed."""
        path = folder / FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["schema"] != SCHEMA:
                raise UserError(f"{path}: schema {values['schema']}, this version reads {SCHEMA}")
            runs = []
            for run in values["runs"]:
                point = Point(tuple(run["values"].items()), run["baseline"], run["seed"])
                config = config_from_json(json.dumps(run["config"]), f"{path}, {run['name']}")
                if config.digest() != run["config_digest"]:
                    raise UserError(
                        f"{path}: the configuration of {run['name']} is not the one whose digest stands beside it; "
                        "begin the sweep again in another --output"
                    )
                runs.append(Planned(point, config, run["refused"]))
            return cls(values["name"], tuple(values["keys"]), tuple(runs))
        except FileNotFoundError:
            raise UserError(f"{folder}: holds no sweep (no {FILE})") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: is not a sweep of fedgraft's") from None

    def require_same(self, before: Sweep, folder: Path) -> None:
        """Raise :class:`UserError` unless every run of ``before`` is one of this sweep's: runs may only be added."""
        known = {run.name: run.config.digest() for run in self.runs}
        for run in before.runs:
            mend = f"choose another --output, or go on as it was begun with --resume {folder}"
            if run.name not in known:
                raise UserError(f"{folder}: holds another sweep, with a run {run.name}; {mend}")
            if known[run.name] != run.config.digest():
                raise UserError(f"{folder}: holds another sweep, whose {run.name} has other settings; {mend}")


def make(
    config: str,
    axes: Sequence[Axis],
    *,
    overrides: Sequence[str] = (),
    seeds: int = 1,
    baselines: Sequence[str] = (),
    skip_refused: bool = False,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Every combination of ``axes`` on the scenario ``config``, with ``seeds`` seeds from the configuration's on.

    Each is checked as far as it can be without training. Raises :class:`UserError` that names the first that cannot
    run; with ``skip_refused`` it is kept, with the reason, as long as one is left.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise UserError(f"--baselines {unknown[0]}: there are {', '.join(BASELINES)}")
    base = load_scenario(config, overrides)
    wanted = list(points(axes, range(base.seed, base.seed + seeds)))
    planned = [Planned(point, load_scenario(config, [*overrides, *point.overrides])) for point in wanted]
    for name in dict.fromkeys(baselines):
        planned += _baseline(name, wanted, config, overrides)
    # All runs of a seed one after another: they share base model and data.
    planned.sort(key=lambda run: run.point.seed)
    _require_names(planned)
    runs, known = [], set[tuple[tuple[str, str], ...]]()
    for number, run in enumerate(planned):
        watch(number, len(planned))
        try:
            require_startable(run.config, rehearse=run.point.group not in known)
            runs.append(run)
        except UserError as error:
            if not skip_refused:
                raise UserError(f"{run.point.text}: {error} (--skip-refused leaves such points out)") from None
            runs.append(Planned(run.point, run.config, str(error)))
        known.add(run.point.group)
    watch(len(planned), len(planned))
    if all(run.refused for run in runs):
        raise UserError(f"every point of the grid is refused: {runs[0].point.text}: {runs[0].refused}")
    return Sweep(base.name, tuple(axis.key for axis in axes), tuple(runs))


def _baseline(name: str, wanted: Sequence[Point], config: str, overrides: Sequence[str]) -> list[Planned]:
    """The runs of a baseline: one for all points that differ in nothing that matters to it."""
    alike: dict[str, list[Planned]] = {}
    for point in wanted:
        values = tuple((key, value) for key, value in point.values if matters(name, key))
        own = Point(values, name, point.seed)
        loaded = load_scenario(config, [*overrides, *own.overrides, f"simulation.baseline={name}"])
        alike.setdefault(loaded.digest(), []).append(Planned(own, loaded))
    found = []
    for runs in alike.values():
        common = set.intersection(*(set(run.point.values) for run in runs))
        values = tuple(pair for pair in runs[0].point.values if pair in common)
        found.append(Planned(Point(values, name, runs[0].point.seed), runs[0].config))
    return found


def _require_names(planned: Sequence[Planned]) -> None:
    """Two points that come to the same configuration would be counted as two seeds."""
    found: dict[str, Planned] = {}
    for run in planned:
        twin = found.setdefault(run.config.digest(), run)
        if twin is not run:
            raise UserError(f"{twin.point.text} and {run.point.text} are the same run; leave one out")
