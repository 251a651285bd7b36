"""`fedgraft dev`: a deployment on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="A whole deployment on this machine, with TLS and keys as in production.", no_args_is_help=True)
_Folder = Annotated[Path, typer.Option("--output", help="The folder of the federation.")]
_FOLDER = Path("dev")


@app.command()
def up(
    config: Annotated[str, typer.Argument(help="A TOML file, or a scenario that comes with fedgraft.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    output: _Folder = _FOLDER,
    port: Annotated[int, typer.Option(help="Where the server listens; 0: at a free port.", min=0, max=65535)] = 0,
    run: Annotated[bool, typer.Option("--run", help="Submit the configuration, and end when it is done.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running: fedgraft dev down ends it.")] = False,
) -> None:
    """Provision, start the server and all sites, and end them with Ctrl-C, or with the job."""
    from ...deployment.files import private_folder, write
    from ...deployment.processes import ended_on_signals
    from ...server.deployed import jobs
    from ...server.deployed.control import Control
    from ..scenario import load_scenario
    from .dealing import with_files
    from .running import Loopback

    settings = with_files(load_scenario(config, overrides or []), output / "data")
    private_folder(output)
    write(output / "job.json", settings.to_json())
    loopback = Loopback(output, settings)
    loopback.provision(port)

    def say(line: str) -> None:
        print(line, flush=True)

    with ended_on_signals(), loopback.running(say):
        if run:
            kit = loopback.server
            control = Control(kit)
            name, _ = jobs.submit(kit, control, settings)
            for text in jobs.follow(kit, control, name):
                print(text, end="", flush=True)
            jobs.require_completed(kit, control, name)
            say(f"{kit.runs / name}")
            return
        say(f"submit jobs by: fedgraft job submit {output / 'job.json'} --kit {loopback.kits / 'server'}")
        if detach:
            loopback.leave()
            say(f"end it by: fedgraft dev down --output {output}")
            return
        while True:
            loopback.require_alive()
            time.sleep(1)


@app.command()
def down(output: _Folder = _FOLDER) -> None:
    """End a federation that was left running."""
    from .running import down as end

    print(f"ended: {', '.join(end(output)) or 'nobody; all had ended before'}")
