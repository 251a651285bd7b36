"""Runs side by side: what differs in their settings, what came out, how far their adapters are apart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ...server import checkpoints
from ...server.files import write_text
from ...server.report import elements as el
from ..display import percent, size
from .plots import PICTURES, accuracy_by_round, as_element, as_file
from .results import MEASURES, Curve, Group, Results, curve, measured, require_run
from .statistics import estimate

#: With more runs than this they are lines of the table, not columns.
_ABREAST = 5
_LONGEST = 60
#: With more settings that differ than these they are left to files, where runs stand below one another.
_FEW = 3
_FURTHEST = "from the first"
_SHORT = ("accuracy before", "accuracy", "ε spent", "bytes up a site", "seconds", "adapter", _FURTHEST)
_NOTHING = "–"


@dataclass(frozen=True)
class Compared:
    """One run: what it is called here, its run.json, its numbers, its curve, and its last adapter where it has one."""

    label: str
    folder: Path
    run: Mapping[str, Any]
    numbers: Mapping[str, Any]
    curve: Curve
    state: AdapterState | None


@dataclass(frozen=True)
class Comparison:
    """Several runs, and the dotted keys of their configurations that differ."""

    runs: tuple[Compared, ...]
    differing: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Read the runs in ``folders``. Raises :class:`UserError` where one holds none."""
        if len(folders) < 2:
            raise UserError("give two or more run directories to compare")
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise UserError("a run directory is there twice; give each once")
        names = [folder.resolve().name for folder in folders]
        labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
        runs = tuple(_read(label, folder) for label, folder in zip(labels, folders, strict=True))
        flat = [dict(_flat(run.run["config"])) for run in runs]
        keys = dict.fromkeys(key for config in flat for key in config if key != "name")
        values = {key: tuple(config.get(key) for config in flat) for key in keys}
        return cls(runs, {key: found for key, found in values.items() if any(one != found[0] for one in found[1:])})

    @property
    def distances(self) -> tuple[float | None, ...]:
        """Largest difference of a number of each adapter from the first run's; None where they are no such adapters."""
        first = self.runs[0].state
        return tuple(_distance(first, run.state) for run in self.runs)

    @property
    def equal(self) -> bool | None:
        """Whether all final adapters are equal to the bit; None where a run has none yet."""
        digests = {run.run["digest"] for run in self.runs if run.state is not None}
        return len(digests) == 1 if all(run.state is not None for run in self.runs) else None

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        found = []
        if not self.differing:
            found.append("the configurations are equal")
        if self.equal:
            found.append("the final adapters are equal, bit by bit")
        if len(self.runs) > _ABREAST and len(self.differing) > _FEW:
            found.append(f"{len(self.differing)} settings differ: --output FILE.csv, .md or .html has them all")
        for run in self.runs:
            if not run.curve.rounds:
                kept = run.run["config"]["evaluate"]["release"] == "none"
                found.append(f"{run.label}: {'its evaluations stay at the sites' if kept else 'no evaluation yet'}")
            if run.run["status"] != "finished":
                found.append(f"{run.label}: {run.run['status']}{f': {e}' if (e := run.run['error']) else ''}")
        return found

    def lines(self) -> list[tuple[str, list[str]]]:
        """The table: a title, and what it is for each run."""
        settings = [(key, [_short(value) for value in values]) for key, values in self.differing.items()]
        facts = [(title, [show(run) for run in self.runs]) for title, show in _FACTS.items()]
        facts = [(title, shown) for title, shown in facts if set(shown) != {_NOTHING}]
        apart = [_NOTHING if far is None else "equal" if far == 0 else f"{far:.2g}" for far in self.distances]
        return [*settings, *facts, (_FURTHEST, ["", *apart[1:]])]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        runs = [
            {
                "run": run.label,
                "path": str(run.folder),
                "status": run.run["status"],
                "rounds": run.run["rounds"],
                **run.numbers,
                "distance": far,
            }
            for run, far in zip(self.runs, self.distances, strict=True)
        ]
        differing = {key: list(values) for key, values in self.differing.items()}
        return {"differing": differing, "adapters_equal": self.equal, "runs": runs}

    def drawing(self) -> Results:
        """The runs as the pictures of a sweep take them."""
        groups = tuple(_group(run) for run in self.runs if run.curve.rounds)
        if not groups:
            raise UserError("none of the runs has an evaluation yet: there is nothing to draw")
        return Results("", ("run",), (), groups)


_FACTS: dict[str, Callable[[Compared], str]] = {
    "status": lambda run: str(run.run["status"]),
    "rounds": lambda run: str(run.run["rounds"]),
    "accuracy before": lambda run: percent(run.numbers["accuracy_before"]),
    "accuracy": lambda run: percent(run.numbers["accuracy"]),
    "worst site": lambda run: percent(run.numbers["worst_site_accuracy"]),
    "loss": lambda run: _as(run.numbers["loss"], "{:.3f}"),
    "ε spent": lambda run: _as(run.numbers["epsilon"], "{:.2f}"),
    "bytes up a site": lambda run: _NOTHING if (up := run.numbers["bytes_up_site"]) is None else size(up),
    "bytes up": lambda run: size(run.numbers["bytes_up"]),
    "bytes down": lambda run: size(run.numbers["bytes_down"]),
    "seconds": lambda run: _as(run.numbers["seconds"], "{:.1f}"),
    "virtual seconds": lambda run: _as(run.numbers["virtual_seconds"], "{:,.0f}"),
    "engine": lambda run: str(run.run["engine"]),
    "adapter": lambda run: str(run.run["digest"])[:12],
}


def _as(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _read(label: str, folder: Path) -> Compared:
    run = require_run(folder)
    try:
        state = checkpoints.load_last(folder / "checkpoints").state
    except UserError:
        state = None  # moved away, or not yet there: the numbers can be compared all the same
    return Compared(label, folder, run, measured(folder, run), curve(folder), state)


def _distance(first: AdapterState | None, other: AdapterState | None) -> float | None:
    if first is None or other is None or first.spec.bare != other.spec.bare:
        return None
    names = first.spec.bare.names
    return max(float(np.abs(first[n].astype(np.float64) - other[n]).max(initial=0.0)) for n in names)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value):
        value = ", ".join(each["name"] for each in value)  # sites
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _group(run: Compared) -> Group:
    privacy = run.run["config"]["privacy"]
    estimates = {name: found for name in MEASURES if (found := estimate([run.numbers[name]])) is not None}
    promise = privacy["epsilon"] if privacy["enabled"] else None
    return Group((("run", run.label),), "", promise, estimates, 1, 1, "", (run.curve,))


def as_table(comparison: Comparison) -> Table:
    """For the terminal: runs abreast, or where there are many below one another and with what matters most."""
    abreast = len(comparison.runs) <= _ABREAST
    rows = _turned(comparison) if abreast else _below(comparison)
    table = Table(box=box.SIMPLE_HEAD)
    for index, title in enumerate(rows[0]):
        table.add_column(_breakable(title), justify="right" if index else "left", overflow="fold")
    for cells in rows[1:]:
        table.add_row(*map(_breakable, cells))
    return table


def _breakable(text: str) -> Text:
    """A name that is made of settings breaks between them."""
    return Text(text.replace(",", ", ") if "=" in text else text)


def _turned(comparison: Comparison) -> list[list[str]]:
    """A column a run, the first row its labels."""
    return [["", *(run.label for run in comparison.runs)], *([title, *cells] for title, cells in comparison.lines())]


def _below(comparison: Comparison) -> list[list[str]]:
    """A row a run, with the settings that differ where they are few."""
    few = len(comparison.differing) <= _FEW
    kept = [(title, cells) for title, cells in comparison.lines() if title in _SHORT or (few and title not in _FACTS)]
    head = ["run", *(title for title, _ in kept)]
    return [head, *([run.label, *(c[i] for _, c in kept)] for i, run in enumerate(comparison.runs))]


def write(comparison: Comparison, path: Path) -> Path:
    """Write ``path`` as its ending says: .html, .svg (accuracy over rounds), .md or .csv. Raises :class:`UserError`."""
    makers = {".html": _html, ".svg": _svg, ".md": _markdown, ".csv": _csv}
    if path.suffix not in makers:
        raise UserError(f"--output {path}: the ending says what to write: {', '.join(makers)}")
    write_text(path, makers[path.suffix](comparison))
    return path


def _svg(comparison: Comparison) -> str:
    figure = accuracy_by_round(comparison.drawing())
    if figure is None:
        raise UserError("none of the runs has an accuracy: there is nothing to draw")
    return as_file(figure)


def _csv(comparison: Comparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    known = comparison.to_dict()["runs"]
    writer.writerow([*known[0], *comparison.differing])
    for index, run in enumerate(known):
        settings = [_plain(values[index]) for values in comparison.differing.values()]
        writer.writerow([*("" if value is None else value for value in run.values()), *settings])
    return text.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _markdown(comparison: Comparison) -> str:
    head, *rows = _turned(comparison)
    rows = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in comparison.notes)]) + "\n"


def _html(comparison: Comparison) -> str:
    head, *rows = ([el.text(cell) for cell in row] for row in _turned(comparison))
    table = el.table(head, rows, "sites")
    notes = "".join(f"<li>{el.text(note)}</li>" for note in comparison.notes)
    figures = []
    if any(run.curve.rounds for run in comparison.runs):
        for name in ("curves", "accuracy-bytes"):
            title, draw = PICTURES[name]
            figure = draw(comparison.drawing())
            if figure is not None:
                figures.append(el.figure(as_element(figure, name), title, "", "wide"))
    sections = (
        f'<header><p class="over">fedgraft compare</p><h1>{len(comparison.runs)} runs</h1></header>',
        el.section("Side by side", table + (f"<ul>{notes}</ul>" if notes else "")),
        el.section("Course of the runs", f'<div class="charts">{"".join(figures)}</div>' if figures else ""),
    )
    return el.document("fedgraft compare", sections)
