"""`fedgraft export`."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Tool(StrEnum):
    """Who is to read a run."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"


def export(
    folder: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    destination: Annotated[
        str, typer.Argument(help="A folder; for MLflow also the address of a server.", show_default=False)
    ],
    to: Annotated[Tool, typer.Option("--to", help="For which tool.", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", help="Until the run is over.")] = False,
) -> None:
    """Write a run's metrics for TensorBoard or MLflow. A second export adds nothing."""
    from .export import MLflow, Sink, TensorBoard
    from .export import export as bring

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    sink: Sink = TensorBoard(folder, Path(destination)) if to == Tool.tensorboard else MLflow(folder, destination)
    try:
        count = bring(folder, sink, follow=follow)
    except KeyboardInterrupt:
        return
    print(f"{count} points of {folder} for {to.value}: {destination}")
