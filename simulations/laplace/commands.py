"""`fedgraft methods laplace`: how sure a trained adapter is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...core.errors import UserError
from ...server.method_commands import app


@app.command()
def laplace(
    job: Annotated[Path, typer.Argument(help="The job file that the adapter was trained by.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter's PEFT folder, or run directory.")],
    data: Annotated[Path, typer.Option(help="Labelled records that everyone may see; none of them a patient's.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    records: Annotated[
        Path | None, typer.Option(help="Records to predict; they stay here, and need no labels.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The JSONL file of the predictions.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Draws of the scores for each prediction.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Calibrate a trained LoRA adapter by public records (Laplace-LoRA), and predict with calibrated chances.

    The approximation tells of the records that it is made of, without noise: give no patient's with --data.
    """
    from ...core.config import load_config
    from ...core.records import read_table
    from ...server.files import write_text
    from .run import fitted

    if (records is None) != (output is None):
        raise UserError("--records and --output go together: what to predict, and where to")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        going = bar.add_task("fitting", total=None)
        found = fitted(
            load_config(job, overrides or []),
            adapter,
            data,
            draws,
            lambda done, of: bar.update(going, completed=done, total=of),
        )
    if records is not None and output is not None:
        inputs = read_table(records, found.config, trains=False, labels=False).inputs
        labels = found.config.task.labels
        rows = found.chances(found.model.task.encode(inputs, None, found.model.base.processor)).tolist()
        lines = [
            json.dumps({"label": labels[row.index(max(row))], "chances": dict(zip(labels, row, strict=True))})
            for row in rows
        ]
        write_text(output, "".join(f"{line}\n" for line in lines))
    if as_json:
        measured = {"plain": asdict(found.plain), "laplace": asdict(found.sampled)}
        told = {"records": found.records, "held_out": found.held_out, "precision": found.precision}
        print(json.dumps({**told, **measured}))
        return
    out = Console(highlight=False)
    table = Table("", "accuracy", "-log p", "calibration error", box=SIMPLE_HEAD)
    for name, measure in (("adapter alone", found.plain), ("with Laplace", found.sampled)):
        table.add_row(name, f"{100 * measure.accuracy:.1f} %", f"{measure.loss:.4f}", f"{100 * measure.error:.1f} %")
    out.print(table)
    out.print(
        f"fitted by {found.records:,} public records, measured on {found.held_out:,} others; the prior's precision is "
        f"{found.precision:.3g}",
        soft_wrap=True,
    )
    if output is not None:
        out.print(f"{output}: {len(rows):,} predictions", soft_wrap=True, markup=False)
