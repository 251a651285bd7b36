"""`fedgraft attack`: what it takes and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def attack(
    run_dir: Annotated[Path, typer.Argument(help="A finished run.")],
    shadows: Annotated[int, typer.Option(help="Shadow federations a curve; each costs as much as the run.")] = 8,
    twin: Annotated[bool, typer.Option("--twin", help="Beside it the same run without privacy.")] = False,
    against: Annotated[Path | None, typer.Option(help="Beside it another finished run on the same data.")] = None,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Attack the run's recipe on halves of its training data, not its adapter.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the result (default: RUN_DIR/attack).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Infer who was in a run's training data, with shadow federations (LiRA), and draw the ROC."""
    from ...server.files import cannot_write, write_json
    from . import run
    from .picture import draw

    finished = run.Finished.at(run_dir)
    other = run.Finished.at(against) if against is not None else None
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("reading the run", total=None)
        done = -1

        def watch(what: str, total: int) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=what, total=total, completed=done)

        report = run.attack(
            finished, shadows=shadows, twin=twin, against=other, kind="recipe" if recipe else None, watch=watch
        )
    folder = output or run_dir / "attack"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    told, picture = folder / "attack.json", folder / "attack.png"
    write_json(told, report)
    draw(report, picture)
    if as_json:
        thin = [{k: v for k, v in curve.items() if k not in ("fpr", "tpr")} for curve in report["curves"]]
        print(json.dumps({**report, "curves": thin, "json": str(told), "png": str(picture)}))
        return
    _print(report, told, picture)


def _print(report: dict[str, Any], told: Path, picture: Path) -> None:
    out = Console()
    table = Table("attacked", "ε", "AUC", "TPR at 1 % FPR", "at 0.1 %", f"members / other {report['unit']}s")
    for curve in report["curves"]:
        table.add_row(
            Text(curve["name"]),
            f"{curve['epsilon']:.2f}" if curve["private"] else "none",
            f"{curve['auc']:.3f} ± {curve['auc_error']:.3f}",
            *(_percent(curve["tpr_at"][rate]) for rate in ("0.01", "0.001")),
            f"{curve['members']:,} / {curve['others']:,}",
        )
    out.print(table)
    what = "the run's own adapter" if report["target"] == "run" else "the run's recipe, on halves of its training data"
    out.print(f"attacked: {what}; {report['shadows']} shadows; guessing has AUC 0.5")
    for name, value in (("json", told), ("picture", picture)):
        out.print(f"{name:<8} {value}", soft_wrap=True, highlight=False, markup=False)


def _percent(value: float | None) -> str:
    return "too few to say" if value is None else f"{100 * value:.1f} %"
