"""The two Flower apps of a simulated federation, for `flwr run .` and for the engines.

Sites are simulated, so their data come from the scenario and their folders lie inside the run directory.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from ..client.app import client_app
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from ..server.app import run_on
from .choice import on_flower
from .delays import delayed
from .display import Lines, closing_lines, final_table
from .fate import require_enough
from .onlooker import Simulator
from .scenario import load_scenario
from .sites import SimulatedSites


def run_folder(context: Context) -> Path:
    """The run directory, which the server and every simulated site derive alike from Flower's context.

    ``output`` or ``resume`` of the run configuration, else a folder in the user's home named by Flower's run id: the
    processes of Flower's runtime share no working directory.
    """
    settings = context.run_config
    chosen = str(settings.get("resume") or settings.get("output") or "")
    return Path(chosen) if chosen else Path.home() / "fedgraft-runs" / f"flower-{context.run_id}"


def make_simulated_client(folder: Path | None = None, watch: Watch = SILENT) -> ClientApp:
    """A ClientApp of simulated sites, which keep their records in the run directory.

    ``folder``: that directory, or what the context says.
    """
    return client_app(SimulatedSites(lambda context: folder or run_folder(context), watch).answer)


client = make_simulated_client()
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario ``config`` with the overrides ``set``, separated by ``;``, into the run directory."""
    console = Console(width=110)
    try:
        _run(grid, context, console)
    except UserError as error:
        # Flower marks the run as failed by the exception; the line above its traceback is for people.
        console.print(f"fedgraft: {error}", soft_wrap=True, highlight=False, markup=False)
        raise


def _run(grid: Grid, context: Context, console: Console) -> None:
    settings = context.run_config
    overrides = [part.strip() for part in str(settings.get("set", "")).split(";") if part.strip()]
    config = load_scenario(str(settings.get("config", "")), overrides)
    require_enough(config)
    watch, folder = Lines(console, config), run_folder(context)
    run = run_on(
        delayed(grid, config),
        config,
        folder,
        engine="flower",
        resume=bool(settings.get("resume")),
        watch=watch,
        onlooker=Simulator(config, on_flower(int(settings.get("threads", 1))).told()),
    )
    console.print(final_table(run))
    for line in closing_lines(run):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
