"""`fedgraft methods advise`: which method to take."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ...server.method_commands import app, short, size_of

if TYPE_CHECKING:
    from .ranking import Advice

_TOP = 12


@app.command()
def advise(
    model: Annotated[str, typer.Option(help="A model folder or hub name; without it, BERT-base.")] = "",
    sites: Annotated[int, typer.Option(min=1, help="Sites of the federation.")] = 4,
    epsilon: Annotated[
        float, typer.Option(min=0, help="Budget for each record over the whole run; 0: no privacy.")
    ] = 8.0,
    uplink: Annotated[float, typer.Option(min=1e-3, help="Mbit/s that a site sends.")] = 20.0,
    memory: Annotated[float, typer.Option(min=0, help="GiB that a site has for the training.")] = 8.0,
    records: Annotated[int, typer.Option(min=10, help="Records of a site.")] = 1000,
    labels: Annotated[int, typer.Option(min=2, help="Classes of the task's head.")] = 2,
    all_: Annotated[
        bool, typer.Option("--all", help="Show all methods, also those that are out of the question.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank the methods for a model and a federation, by what each sends, holds, and drowns in noise."""
    from ...methods import methods
    from ...server.traffic import skeleton
    from .ranking import Federation, advise, measured

    federation = Federation(sites, epsilon, uplink, memory, units=records, batch=max(1, records // 8))
    on, known = skeleton(model, labels), methods()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        going = bar.add_task("counting", total=len(known))
        found = advise(known, on, federation, lambda name: bar.update(going, advance=1, description=name))
    if as_json:
        print(
            json.dumps(
                {"federation": asdict(federation), "noise": federation.noise, "methods": [asdict(x) for x in found]}
            )
        )
        return
    good = [advice for advice in found if not advice.against]
    out = Console(highlight=False)
    out.print(_table(good if all_ else good[:_TOP], private=epsilon > 0))
    if all_:
        for advice in found:
            if advice.against:
                out.print(f"[dim]{escape(advice.method)}: {escape(advice.against)}[/]")
    hidden = (
        "" if all_ else f"; {max(0, len(good) - _TOP)} more, and {len(found) - len(good)} out of the question: --all"
    )
    out.print(f"{len(good)} of {len(found)} methods fit{hidden}.")
    out.print(f"expected: accuracy on {measured()['what']}, by the noise here.", soft_wrap=True)
    if epsilon:
        out.print(
            f"noise: of a step over the longest that its signal can be; {federation.steps} steps of {federation.batch} "
            f"of {records:,} records at epsilon {epsilon:g} take noise multiplier {federation.noise:.2f}.",
            soft_wrap=True,
        )


def _table(found: list[Advice], *, private: bool) -> Table:
    columns = ["method", "expected", "trains", "a round", *(["noise"] if private else []), "GiB"]
    table = Table(*columns, "because", box=SIMPLE_HEAD)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for advice in found:
        cells = [
            advice.method,
            "" if advice.expected is None else f"{100 * advice.expected:.0f} %",
            short(advice.count.trained),
            f"{size_of(advice.count.shared)}, {advice.seconds_up:.1f} s",
            *([f"{advice.noise:.2f}"] if private else []),
            f"{advice.memory:.2g}",
            ", ".join(advice.reasons),
        ]
        table.add_row(*cells)
    return table
