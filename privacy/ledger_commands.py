"""`fedgraft privacy ledger`: what a site has spent, and whether its record is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.errors import UserError
from .accounting import require_known
from .auditlog import FILE as AUDIT_LOG
from .auditlog import LEDGERS, require_ledger_of_audit
from .journal import Journal
from .ledger import Entry, Ledger, ledger_file

app = typer.Typer(help="Show or verify a site's ledger.", no_args_is_help=True)
_PATH = typer.Argument(help="A ledger file, a site's folder, or a run directory.", show_default=False)


@dataclass(frozen=True)
class _Account:
    """What was spent on one dataset at one place."""

    place: Path
    ledger: Ledger
    entries: tuple[Entry, ...]

    def delta(self) -> float:
        """The least delta that was promised."""
        said = [delta for entry in self.entries if isinstance(delta := entry.about.get("delta"), float)]
        return min(said, default=1e-5)

    def epsilon(self, delta: float, neighbours: str) -> float:
        # Under the split in force now; what was spent under another one adds up.
        split = self.entries[-1].split
        return self.ledger.total(delta, split, neighbours=neighbours)


@app.command()
def show(
    path: Annotated[Path, _PATH],
    delta: Annotated[float | None, typer.Option(help="Delta of the composed epsilon (default: the runs' own).")] = None,
    neighbours: Annotated[str, typer.Option(help="add_remove or replace_one.")] = "add_remove",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what was spent, and the epsilon that it comes to."""
    require_known(neighbours, "pld")
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"--delta {delta:g} is not between 0 and 1")
    accounts = list(_accounts(path))
    if as_json:
        print(json.dumps({"ledgers": [_as_json(account, delta, neighbours) for account in accounts]}))
        return
    console = Console()
    if not accounts:
        console.print(f"{path}: nothing was spent", soft_wrap=True, highlight=False)
    for account in accounts:
        told = _as_json(account, delta, neighbours)
        table = Table("run", "round", "part", "noise", "rate", "steps", "outcome", title=_title(account))
        for entry in account.entries:
            table.add_row(*_row(entry))
        console.print(table)
        noise = "" if told["private_noise"] else "; noise from a seed is among it: NOT private"
        console.print(
            f"epsilon {told['epsilon']:.4g} at delta {told['delta']:g}, {neighbours}, for each {told['unit']}{noise}",
            highlight=False,
        )


@app.command()
def verify(path: Annotated[Path, _PATH]) -> None:
    """Check the hash of every line of a ledger, or of all that a site keeps, its audit log included."""
    console = Console()
    for file, ledger in _files(path):
        entries = _journal(file, ledger).entries()
        if ledger:
            Ledger(file).entries()
        head = f", last {entries[-1]['sha256']}" if entries else ""
        console.print(
            f"{file}: {len(entries)} line{'s' if len(entries) != 1 else ''}, each as it was written{head}",
            soft_wrap=True,
            highlight=False,
        )
    for folder in _site_folders(path):
        require_ledger_of_audit(folder)
    console.print("The hashes find damage and careless edits. Whoever may write a file could have written it anew.")


def _accounts(path: Path) -> Iterator[_Account]:
    for place in _places(path):
        for dataset in sorted({entry.dataset for entry in Ledger(place).entries()}):
            ledger = Ledger(place, dataset=dataset)
            yield _Account(place, ledger, ledger.entries())


def _places(path: Path) -> list[Path]:
    """The folders and single files in which ledgers lie. Raises :class:`UserError` where there is none."""
    if path.is_file():
        return [path]
    server = sorted(path.glob("*-ledger.jsonl"))
    found = [*server, *(folder / LEDGERS for folder in _site_folders(path))]
    if not found and path.is_dir() and list(path.glob("*.jsonl")):
        found = [path]
    if not found:
        raise UserError(f"{path}: holds no ledger; give a ledger file, a site's folder or a run directory")
    return found


def _site_folders(path: Path) -> list[Path]:
    """``path`` itself when it is a site's folder, which may have refused all so far; the sites of a run directory."""
    folders = [path, *sorted(path.glob("sites/*"))]
    return [folder for folder in folders if (folder / LEDGERS).is_dir() or (folder / AUDIT_LOG).is_file()]


def _files(path: Path) -> list[tuple[Path, bool]]:
    """Every journal, and whether it is a ledger."""
    if path.is_file():
        return [(path, _is_ledger(path))]
    found = [(file, True) for place in _places(path) for file in (sorted(place.glob("*.jsonl")) or [place])]
    logs = [(file, False) for folder in _site_folders(path) for file in sorted(folder.glob("*.jsonl"))]
    return [(file, ledger) for file, ledger in (*found, *logs) if file.is_file()]


def _is_ledger(file: Path) -> bool:
    return file.parent.name == LEDGERS or file.stem.endswith("ledger")


def _journal(file: Path, ledger: bool) -> Journal:
    if ledger:
        return ledger_file(file)
    return Journal(file, name="file", stop="nothing is written", damage="keep it as it is for whoever must know")


def _title(account: _Account) -> str:
    name = account.entries[-1].dataset
    return f"{account.place}{f' ({name})' if name else ''}"


def _row(entry: Entry) -> tuple[str, ...]:
    steps = str(entry.steps) if entry.taken in (None, entry.steps) else f"{entry.taken} of {entry.steps}"
    return (
        str(entry.about.get("run", "")),
        str(entry.about.get("round", "")),
        entry.part,
        ", ".join(f"{event.noise_multiplier:.4g}" for event in entry.events),
        ", ".join(f"{event.sampling_rate:.4g}" for event in entry.events),
        steps,
        (entry.outcome or "not settled: all of it counts") + _resumed(entry.resumed),
    )


def _resumed(times: int) -> str:
    return "" if not times else ", taken up again" if times == 1 else f", taken up again {times} times"


def _as_json(account: _Account, delta: float | None, neighbours: str) -> dict[str, Any]:
    delta = delta or account.delta()
    last = account.entries[-1]
    return {
        "place": str(account.place),
        "dataset": last.dataset,
        "unit": last.unit or "unit",
        "delta": delta,
        "neighbours": neighbours,
        "epsilon": account.epsilon(delta, neighbours),
        "private_noise": account.ledger.private_noise(),
        "last": account.ledger.head,
        "entries": [
            {
                "time": entry.time.isoformat(),
                "part": entry.part,
                "split": entry.split,
                "fingerprint": entry.fingerprint,
                "private_noise": entry.private_noise,
                "steps": entry.steps,
                "taken": entry.taken,
                "outcome": entry.outcome,
                "resumed": entry.resumed,
                "events": [event.to_dict() for event in entry.events],
                **entry.about,
            }
            for entry in account.entries
        ],
    }
