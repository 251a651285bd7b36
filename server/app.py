"""The Flower ServerApp of a deployment: configuration file and output folder come from the run configuration."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..core.config import RunConfig, load_config
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from .onlooker import NOBODY, Onlooker
from .prompt import prompt
from .rounds import Federation
from .rundir import RunDirectory


def run_on(
    grid: Grid,
    config: RunConfig,
    output: Path,
    *,
    engine: str,
    resume: bool,
    watch: Watch = SILENT,
    onlooker: Onlooker = NOBODY,
) -> dict[str, object]:
    """Run a federation over ``grid`` into ``output`` and return its run.json."""
    with RunDirectory.open(output) if resume else RunDirectory.create(output) as rundir:
        run = Federation(prompt(grid), config, rundir, engine=engine, resume=resume, watch=watch, onlooker=onlooker)
        return run.start()


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``config`` (a TOML file), ``set`` (overrides, one a line), ``output`` and ``resume`` say."""
    settings = {key: str(context.run_config.get(key, "")) for key in ("config", "set", "output", "resume")}
    if not settings["config"] or not (settings["output"] or settings["resume"]):
        raise UserError("give config=FILE and output=FOLDER (or resume=FOLDER) in the run configuration")
    config = load_config(settings["config"], settings["set"].splitlines())
    if config.simulated:
        raise UserError(
            f"{settings['config']}: {config.simulated[0]} is for simulations; these sites are real, so leave it out"
        )
    folder = Path(settings["resume"] or settings["output"])
    run_on(grid, config, folder, engine="flower", resume=bool(settings["resume"]))
