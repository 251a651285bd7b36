"""`fedgraft scenarios`: list them, show one, preview what a configuration deals to its sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...core.config import load_config

app = typer.Typer(help="The scenarios: list them, show one, preview how records are dealt.", add_completion=False)
#: So many sites and classes have a row and a column of their own.
_ROWS, _COLUMNS = 20, 12


@app.callback(invoke_without_command=True)
def _list(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the scenarios that come with fedgraft."""
    from ..scenario import named

    if context.invoked_subcommand is not None:
        return
    rows = [_row(name) for name in named()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "what it shows", "sites", "privacy", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(
            row["name"], row["about"], f"{row['sites']:,}", f"ε {row['epsilon']:g}" if row["epsilon"] else "off"
        )
    console = Console()
    console.print(table)
    console.print(
        "run one: fedgraft simulate NAME   more: fedgraft scenarios show NAME, fedgraft scenarios preview NAME"
    )


def _row(name: str) -> dict[str, Any]:
    from ..scenario import scenario_path

    config = load_config(scenario_path(name))
    return {
        "name": name,
        "about": _about(scenario_path(name).read_text(encoding="utf-8")),
        "sites": len(config.site_names),
        "task": config.task.name,
        "strategy": config.strategy,
        "epsilon": config.privacy.epsilon if config.privacy.enabled else None,
    }


def _about(text: str) -> str:
    """The first sentence of the comment that a scenario begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines).partition(". ")[0].rstrip(".")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A scenario that comes with fedgraft.")]) -> None:
    """Print a scenario's file, to read it or to begin one's own."""
    from ..scenario import scenario_path

    print(scenario_path(name).read_text(encoding="utf-8"), end="")


@app.command()
def preview(
    config: Annotated[str, typer.Argument(help="A TOML file, or a scenario that comes with fedgraft.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    output: Annotated[Path | None, typer.Option(help="Draw a picture too: a .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Deal a configuration's records as a run would, and show what each site gets. Nothing is trained."""
    from ..scenario import load_scenario
    from .picture import draw
    from .tally import tally

    settings = load_scenario(config, overrides or [])
    found = tally(settings)
    if output is not None:
        draw(found, f"{settings.name}: {settings.data.partition}, seed {settings.seed}", output)
    if as_json:
        sites = {
            site: {
                "train": dict(zip(found.classes, found.train[number].tolist(), strict=True)),
                "held_out": int(found.held_out[number]),
                "patients": None if found.patients is None else int(found.patients[number]),
                "differs": found.shifts[number],
            }
            for number, site in enumerate(found.sites)
        }
        print(json.dumps({"name": settings.name, "skew": found.skew, "sites": sites}))
        return
    console = Console()
    console.print(_table(found))
    for line in _closing(found, output):
        console.print(line, soft_wrap=True, highlight=False)


def _table(found: Any) -> Table:
    """A row a site; of many sites the largest and the smallest."""
    order = list(range(len(found.sites)))
    if len(order) > _ROWS:
        order = sorted(order, key=lambda number: -int(found.train[number].sum()))
        order = [*order[: _ROWS // 2], -1, *order[-_ROWS // 2 :]]
    classes = range(len(found.classes)) if 1 < len(found.classes) <= _COLUMNS else ()
    table = Table("site", box=SIMPLE_HEAD)
    table.add_column("records", justify="right")
    if found.patients is not None:
        table.add_column("patients", justify="right")
    table.add_column("held out", justify="right")
    for number in classes:
        table.add_column(Text(found.classes[number][:12]), justify="right")
    if len(found.classes) > _COLUMNS:
        table.add_column("largest class")
    if any(found.shifts):
        table.add_column("differs by")
    for number in order:
        if number < 0:
            table.add_row("…")
            continue
        counts = found.train[number]
        row = [found.sites[number], f"{counts.sum():,}"]
        row += [f"{found.patients[number]:,}"] if found.patients is not None else []
        row += [f"{found.held_out[number]:,}", *(f"{counts[each]:,}" for each in classes)]
        if len(found.classes) > _COLUMNS:
            most = int(counts.argmax())
            row.append(f"{100 * counts[most] / counts.sum():.0f} % {found.classes[most][:30]}")
        table.add_row(*map(Text, row), *([Text(found.shifts[number])] if any(found.shifts) else []))
    return table


def _closing(found: Any, output: Path | None) -> list[str]:
    sizes = sorted(found.train.sum(1).tolist())
    middle = sizes[len(sizes) // 2]
    lines = [
        f"{len(sizes):,} sites, {sum(sizes):,} training records, {int(found.held_out.sum()):,} held out; a site has "
        f"{sizes[0]:,} to {sizes[-1]:,}, half of them {middle:,} or more"
    ]
    if len(found.classes) > 1:
        lines.append(f"skew {found.skew:.2f}: how far a site's mix of classes is from that of all, 0 alike, 1 apart")
    return [*lines, *([f"picture  {output}"] if output is not None else [])]
