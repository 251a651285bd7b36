"""The two Flower apps of a simulated federation, for `flwr run .` and for the engines.

Sites are simulated, so their data come from the scenario and their folders lie inside the run directory.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from ..client.answering import Surroundings
from ..client.app import make_client_app, own_name
from ..client.data import SiteData
from ..client.policy import Policy, load_policy, unrestricted
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from ..server.app import run_on
from .attackers import attacking
from .display import Lines, closing_lines, final_table
from .scenario import load_scenario, site_data


def run_folder(context: Context) -> Path:
    """The run directory, which the server and every simulated site derive alike from Flower's context.

    ``output`` or ``resume`` of the run configuration, else a folder in the user's home named by Flower's run id: the
    processes of Flower's runtime share no working directory.
    """
    settings = context.run_config
    chosen = str(settings.get("resume") or settings.get("output") or "")
    return Path(chosen) if chosen else Path.home() / "fedgraft-runs" / f"flower-{context.run_id}"


def make_simulated_client(folder: Path | None = None, watch: Watch = SILENT) -> ClientApp:
    """A ClientApp of simulated sites; see :func:`simulated`."""
    return make_client_app(simulated(folder), watch)


def simulated(folder: Path | None = None) -> Surroundings:
    """Sites that keep their records in the run directory (``folder``, or what the context says).

    A site that finds a `policy.toml` in its folder there keeps to it; the others have nobody to protect, and let out
    whatever the run asks for, and are attackers where it says so.
    """

    def place(site: str, context: Context) -> Path:
        return (folder or run_folder(context)) / "sites" / site

    def policy(here: Path | None, context: Context) -> Policy:
        own = here / "policy.toml" if here is not None else None
        return load_policy(own) if own is not None and own.exists() else unrestricted()

    def data(config: RunConfig, site: str, path: Path, context: Context) -> SiteData:
        return site_data(config)[site]

    return Surroundings(own_name, place, policy, data, attacking)


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
    watch, folder = Lines(console, config), run_folder(context)
    run = run_on(grid, config, folder, engine="flower", resume=bool(settings.get("resume")), watch=watch)
    console.print(final_table(run))
    for line in closing_lines(run):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
