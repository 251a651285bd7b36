"""`fedgraft methods search`: the configurations of autopeft that are worth their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ...server.method_commands import app, short

if TYPE_CHECKING:
    from .results import Results
    from .space import Point


@app.command()
def search(
    job: Annotated[Path, typer.Argument(help="The job file, with the model, the task and the training.")],
    data: Annotated[Path, typer.Option(help="Records that everyone may see; none of them a patient's.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Configurations to train; more go on with the same file.")] = 40,
    random: Annotated[int, typer.Option(min=1, help="The first ones, which are drawn at random.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each training.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of what is tried; a training has the job's seed.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of the trials.")] = Path("search.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find layers and sizes for autopeft on public records: accuracy against the numbers that train.

    Each trial trains without privacy. On private records it would cost epsilon, which nothing here counts: give none.
    Stopped, the same command goes on.
    """
    from ...core.config import load_config
    from .run import ground_of
    from .run import search as go_on

    ground = ground_of(load_config(job, overrides or []), data, steps)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        going = bar.add_task("choosing", total=trials)

        def told(done: int, point: Point | None) -> None:
            bar.update(going, completed=done, description="done" if point is None else _said(point))

        found = go_on(ground, output, trials=trials, random=random, seed=seed, told=told)
    if as_json:
        print(output.read_text(encoding="utf-8"), end="")
        return
    _print(found, output)


def _said(point: Point) -> str:
    return f"{len(point.layers)} layers, {point.serial}, {point.parallel}, {point.prefix}"


def _print(found: Results, output: Path) -> None:
    out = Console(highlight=False)
    table = Table("", "trains", "accuracy", "layers", "serial", "parallel", "prefix", box=SIMPLE_HEAD)
    for number, trial in enumerate(found.front, 1):
        sizes = (trial.serial, trial.parallel, trial.prefix)
        layers = ",".join(map(str, trial.layers))
        table.add_row(str(number), short(trial.numbers), f"{100 * trial.accuracy:.1f} %", layers, *map(str, sizes))
    out.print(table)
    for number, trial in enumerate(found.front, 1):
        out.print(f"{number}  {trial.point.overrides}", soft_wrap=True, markup=False)
    out.print(
        f"{output}: {len(found.trials)} trials of {found.steps} steps on {found.records:,} records, measured on "
        f"{found.held_out:,} others, which also chose: expect a little less elsewhere.",
        soft_wrap=True,
        markup=False,
    )
