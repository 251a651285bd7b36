"""`fedgraft audit`: what it takes, what it prints, and its exit code."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...core.errors import UserError

_FAILED = 1


def audit(
    config: Annotated[str, typer.Argument(help="A TOML file, a scenario, or a run directory.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    site: Annotated[str, typer.Option(help="Which site (default: the first).")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder of the report (default: audits/SITE-DATE-TIME).")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also put known bugs into the same path; each must be caught.")
    ] = False,
    canaries: Annotated[int, typer.Option(min=0, help="So many made-up units in place of the site's data.")] = 0,
    units: Annotated[int, typer.Option(min=16, help="Privacy units that are looked at.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Noisy steps watched in each training.")] = 6,
    key: Annotated[
        Path | None, typer.Option(help="The key that signs (default: ~/.config/fedgraft/audit-key).")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="The site's folder of ledgers, to be named in the report.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Check the signature of a report (audit.json, audit.html).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Watch a site's own private training, attack it, and sign what was found.

    Exit code 0: every layer is good; 1: one failed, or a known bug was missed.
    """
    if verify is not None:
        _verify(verify, as_json)
        return
    from ...privacy.audit.signature import Signer
    from . import run

    if not config and not self_test:
        raise UserError("say what to audit: a configuration file, a scenario such as hospitals-icd10, a run directory")
    if not config and (overrides or site or canaries or ledger):
        raise UserError("--self-test without a configuration audits a plan of its own; leave the other options out")
    signer = Signer.at(key or _default_key())
    console = Console(stderr=True)
    with _Bar(console) as bar:
        if config:
            target = run.target(config, overrides or [], site=site, canaries=canaries, ledgers=ledger)
            report = run.audit(
                target, canaries=canaries, units=units, steps=steps, test_itself=self_test, watch=bar.part
            )
        else:
            report = run.self_test_alone(units=units, steps=steps, watch=bar.part)
    folder = output or Path("audits") / f"{report['site']}-{datetime.now():%Y%m%d-%H%M%S}"
    told, page = run.write(report, folder, signer)
    if as_json:
        print(json.dumps({**_summary(report), "fingerprint": signer.fingerprint, "json": str(told), "html": str(page)}))
    else:
        _print(report, signer.fingerprint, told, page)
    if not report["good"]:
        raise typer.Exit(_FAILED)


def _default_key() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "fedgraft" / "audit-key"


def _verify(path: Path, as_json: bool) -> None:
    from ...privacy.audit.signature import verify

    report, signature = verify(path)
    if as_json:
        print(json.dumps({"file": str(path), "signature": signature, "good": report["good"] if report else None}))
        return
    print(f"{path}: whole, as it was signed")
    print(f"signed by  {signature['fingerprint']}")
    print("compare this fingerprint with the one that the site gave you by another way")


class _Bar:
    """A bar over the parts of the audit, with the one that runs."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("loading the base model and the site's data", total=None)
        self._done = -1

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def part(self, name: str, parts: int) -> None:
        self._done += 1
        self._progress.update(self._task, description=name, total=parts, completed=self._done)


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    keep = ("good", "site", "claim", "seconds", "self_test", "ledger")
    layers = [{key: layer[key] for key in ("layer", "good", "said", "findings")} for layer in report["layers"]]
    return {**{key: report[key] for key in keep}, "layers": layers}


def _print(report: dict[str, Any], fingerprint: str, told: Path, page: Path) -> None:
    out = Console()
    claim = report["claim"]
    table = Table(
        title=escape(
            f"{report['site']}: ε {claim['epsilon']:.2f}, δ {claim['delta']:g} for each {claim['unit']} "
            f"({claim['neighbours'].replace('_', '/')})"
        )
    )
    for column in ("layer", "", "found"):
        table.add_column(column)
    for layer in report["layers"]:
        lines = [layer["said"], *layer["findings"][:3]]
        table.add_row(layer["layer"], _mark(layer["good"]), escape("\n".join(lines)))
    out.print(table)
    if report["self_test"] is not None:
        tested = Table("known bug", "caught by", title="the audit put to the test")
        for caught in report["self_test"]:
            tested.add_row(escape(caught["text"]), escape(caught["by"]) or "[red]missed[/]")
        out.print(tested)
    for name, value in (("json", told), ("page", page), ("signed by", fingerprint)):
        out.print(f"{name:<10} {value}", soft_wrap=True, highlight=False, markup=False)


def _mark(good: bool) -> str:
    return "[green]good[/]" if good else "[red]failed[/]"
