"""`fedgraft server` and `fedgraft job`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...core.watching.logs import LogFormat, speaker
from ...core.watching.options import LogForm, MetricsAddress, MetricsPort
from ...core.watching.prometheus import ADDRESS, endpoint

if TYPE_CHECKING:
    from prometheus_client import Metric

server = typer.Typer(help="Run the server of a federation, from the folder of its kit.", no_args_is_help=True)
job = typer.Typer(help="Submit jobs and follow them, on the server's machine.", no_args_is_help=True)
_Kit = Annotated[Path, typer.Option("--kit", help="The folder of the server's kit.")]
_Which = Annotated[str, typer.Argument(help="The job's name or number (default: the latest).", show_default=False)]
_HERE = Path()


@server.command()
def start(
    kit: _Kit = _HERE,
    metrics_port: MetricsPort = 0,
    metrics_address: MetricsAddress = ADDRESS,
    log_format: LogForm = LogFormat.text,
) -> None:
    """Serve until Ctrl-C. The roster is read anew when it changes."""
    from ...deployment.kits import ServerKit
    from ..watching.deployment import KitReader
    from .serving import serve

    opened = ServerKit.open(kit)
    reader = KitReader(opened)

    def collect() -> Iterable[Metric]:
        from ..watching.prometheus import kit_metrics

        return kit_metrics(reader.look())

    with endpoint(metrics_port, metrics_address, collect):
        serve(opened, speaker("server", log_format))


@job.command()
def submit(
    config: Annotated[Path, typer.Argument(help="The run's configuration.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    name: Annotated[str, typer.Option(help="What to call it (default: the configuration's name and the time).")] = "",
    resume: Annotated[str, typer.Option(help="Go on with the job of this name.")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Show what it says until it is over.")] = False,
    kit: _Kit = _HERE,
) -> None:
    """Have the sites train. The bundle they get holds the configuration and no code."""
    from ...core.config import load_config
    from ...deployment.kits import ServerKit
    from . import jobs
    from .control import Control

    opened = ServerKit.open(kit)
    control = Control(opened)
    name, _ = jobs.submit(opened, control, load_config(config, overrides or []), name, resume)
    print(name)
    if follow:
        for text in jobs.follow(opened, control, name):
            print(text, end="", flush=True)
        jobs.require_completed(opened, control, name)


@job.command()
def status(
    which: _Which = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    kit: _Kit = _HERE,
) -> None:
    """Tell what became of the jobs, and which sites are connected."""
    from ...deployment.kits import ServerKit
    from . import jobs
    from .control import Control

    control = Control(ServerKit.open(kit))
    runs = [jobs.find(control, which)] if which else control.runs()
    nodes = sorted(control.nodes(), key=lambda node: node.name)
    if as_json:
        found = {"jobs": [vars(run) for run in runs], "sites": {node.name: node.status for node in nodes}}
        print(json.dumps(found))
        return
    table = Table("job", "number", "status", "began", "ended", "why")
    for run in runs:
        table.add_row(run.name, str(run.id), run.status, run.began[:19], run.ended[:19], run.details)
    sites = Table("site", "status")
    for node in nodes:
        sites.add_row(node.name, node.status)
    Console().print(table, sites)


@job.command()
def logs(
    which: _Which = "",
    follow: Annotated[bool, typer.Option("--follow", help="Until the job is over.")] = False,
    kit: _Kit = _HERE,
) -> None:
    """Show what a job said."""
    from ...deployment.kits import ServerKit
    from . import jobs
    from .control import Control

    control = Control(ServerKit.open(kit))
    for text in control.logs(jobs.find(control, which).id, follow=follow):
        print(text, end="", flush=True)


@job.command()
def stop(which: _Which = "", kit: _Kit = _HERE) -> None:
    """End a job. What its sites have spent stays spent."""
    from ...deployment.kits import ServerKit
    from . import jobs
    from .control import Control

    opened = ServerKit.open(kit)
    run = jobs.stop(opened, Control(opened), which)
    print(f"{run.name}: stopped; to go on: fedgraft job submit CONFIG --resume {run.name}")


@job.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The job's name.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Where to (default: a folder of the job's name).")] = None,
    kit: _Kit = _HERE,
) -> None:
    """Copy a finished job's adapter, report and records to a folder of yours."""
    from ...deployment.kits import ServerKit
    from . import jobs

    print(jobs.fetch(ServerKit.open(kit), name, output or Path(name)))
