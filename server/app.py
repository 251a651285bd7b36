"""The Flower ServerApp of a deployment: configuration file and output folder come from the run configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..core.config import RunConfig, config_from_json, load_config
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from ..core.watching import logs
from ..deployment.kits import SERVER_KIT as KIT
from .onlooker import NOBODY, Onlooker
from .prompt import prompt
from .rounds import Federation, Registered
from .rundir import RunDirectory
from .watching.watched import watched


def run_on(
    grid: Grid,
    config: RunConfig,
    output: Path,
    *,
    engine: str,
    resume: bool,
    watch: Watch = SILENT,
    onlooker: Onlooker = NOBODY,
    registered: Registered | None = None,
) -> dict[str, object]:
    """Run a federation over ``grid`` into ``output`` and return its run.json.

    ``registered``: the site that a node's key stands for, where nodes have keys.
    """
    with (
        RunDirectory.open(output) if resume else RunDirectory.create(output) as rundir,
        watched(rundir.path, watch) as watch,
    ):
        run = Federation(
            prompt(grid, config.server.most_late),
            config,
            rundir,
            engine=engine,
            resume=resume,
            watch=watch,
            onlooker=onlooker,
            registered=registered,
        )
        return run.start()


class Spoken(Watch):
    """Says on standard output what `fedgraft job logs` is to show."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        missing = f", {len(record['missing'])} missing" if record["missing"] else ""
        self.note(f"round {record['round']} {record['kind']}: {record['seconds']:.1f} s{missing}")


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run ``job`` (a configuration as JSON), or what ``config`` (a TOML file) and ``set`` (overrides, one a line) say.

    ``output``, or ``resume``, is the run directory: where `fedgraft server start` runs the server, a name among the
    runs of its kit.
    """
    watch = SILENT if logs.begin(sys.stdout) else Spoken()
    settings = {key: str(context.run_config.get(key, "")) for key in ("job", "config", "set", "output", "resume")}
    try:
        _run(grid, settings, os.environ.get(KIT, ""), watch)
    except UserError as error:
        # Flower marks the run as failed by the exception; the line above its traceback is for people.
        print(f"fedgraft: {error}", flush=True)
        raise


def _run(grid: Grid, settings: Mapping[str, str], kit: str, watch: Watch) -> None:
    if not (settings["config"] or settings["job"]) or not (settings["output"] or settings["resume"]):
        raise UserError("give config=FILE and output=FOLDER (or resume=FOLDER) in the run configuration")
    if settings["job"]:
        config = config_from_json(settings["job"], "the job's configuration")
    else:
        config = load_config(settings["config"], settings["set"].splitlines())
    if config.simulated:
        raise UserError(
            f"{settings['config'] or 'the job'}: {config.simulated[0]} is for simulations; these sites are real, so "
            "leave it out"
        )
    folder = Path(settings["resume"] or settings["output"])
    registered = None
    if kit:
        if folder.name != str(folder) or folder.name in (".", ".."):
            raise UserError(f"{folder}: is not the name of a run; the server keeps all runs in one folder")
        folder = Path(kit) / "runs" / folder
        registered = registered_in(Path(kit) / "state" / "nodes.json")
    resume = bool(settings["resume"])
    run_on(grid, config, folder, engine="flower", resume=resume, watch=watch, registered=registered)


def registered_in(path: Path) -> Registered:
    """The site that a node was registered as, from the file that the server keeps; empty for one that is not there."""

    def name(node: int) -> str:
        try:
            return str(json.loads(path.read_text(encoding="utf-8")).get(str(node), ""))
        except (OSError, ValueError):
            raise UserError(f"{path}: cannot be read, so no site is known; start the server anew") from None

    return name
