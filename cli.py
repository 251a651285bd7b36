"""The `fedgraft` command."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from . import __version__
from .client.composing.commands import embed, route
from .client.merge_commands import merge
from .client.policy_commands import app as policy
from .client.site.commands import app as site
from .core.errors import UserError
from .core.progress import SILENT, Watch
from .core.watching.logs import LogFormat, choose
from .core.watching.options import LogForm, MetricsAddress, MetricsPort
from .core.watching.prometheus import ADDRESS, endpoint
from .deployment.commands import app as provision
from .privacy.commands import app as privacy
from .server.deployed.commands import job, server
from .server.method_commands import app as methods
from .server.strategy_commands import app as strategies
from .server.watching.commands import export
from .simulations.advice import commands as _advice  # noqa: F401
from .simulations.attack.commands import attack
from .simulations.audit.commands import audit
from .simulations.laplace import commands as _laplace  # noqa: F401
from .simulations.loopback.commands import app as dev
from .simulations.preview.commands import app as scenarios
from .simulations.search import commands as _search  # noqa: F401
from .simulations.sweep.commands import compare, sweep

if TYPE_CHECKING:
    from prometheus_client import Metric

app = typer.Typer(
    name="fedgraft",
    help="Federated, differentially private, parameter-efficient fine-tuning on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(privacy, name="privacy")
app.add_typer(policy, name="policy")
app.add_typer(strategies, name="strategies")
app.add_typer(methods, name="methods")
app.add_typer(scenarios, name="scenarios")
app.add_typer(provision, name="provision")
app.add_typer(site, name="site")
app.add_typer(server, name="server")
app.add_typer(job, name="job")
app.add_typer(dev, name="dev")
USER_ERROR = 2
INTERRUPTED = 130


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    # Telemetry and chatter of the libraries have no place in a hospital's terminal.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # What a site logs reaches the terminal through the run's own messages.
    logging.getLogger("fedgraft.site").addHandler(logging.NullHandler())
    logging.getLogger("fedgraft.site").propagate = False
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        print(f"fedgraft: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    except Exception as error:
        # Typer may bring its own copy of click, so its usage errors are known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            raise SystemExit(USER_ERROR) from None
        print(f"fedgraft: {' '.join(error.format_message().split()).rstrip('.')}; see fedgraft --help", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    if code == INTERRUPTED:
        print("fedgraft: stopped; a run that had begun can be resumed with --resume", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def simulate(
    config: Annotated[str, typer.Argument(help="A TOML file, or a scenario that comes with fedgraft.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as you like.")] = None,
    engine: Annotated[str, typer.Option(help="auto, inprocess, workers, or flower (Flower's runtime).")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes of the engine workers; 0: one a GPU, or one a core.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of the arithmetic in each process; 0: all cores.")] = 0,
    cohort: Annotated[int, typer.Option(help="Sites that train in one pass; 0: what a measurement finds.")] = 0,
    profile: Annotated[bool, typer.Option("--profile", help="Tell where the time went.")] = False,
    output: Annotated[Path | None, typer.Option(help="The run directory (default: runs/NAME-DATE-TIME).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    metrics_port: MetricsPort = 0,
    metrics_address: MetricsAddress = ADDRESS,
    log_format: LogForm = LogFormat.text,
) -> None:
    """Run a whole federation on this machine."""
    from .simulations import run as runs
    from .simulations.display import closing_lines, final_table
    from .simulations.engines import torchrun
    from .simulations.execution import Execution
    from .simulations.live import Live
    from .simulations.scenario import load_scenario
    from .simulations.timing import profile_of, profile_table

    execution = Execution(engine, workers, threads, cohort, profile)  # type: ignore[arg-type]
    if torchrun.serves():
        torchrun.join()
    console = Console(stderr=True)
    if resume is not None:
        settings, rounds = _resumed_config(resume, config, overrides or [], output)
    elif config:
        settings, rounds = load_scenario(config, overrides or []), None
    else:
        raise UserError("say what to run: a configuration file, a scenario such as hospitals-icd10, or --resume DIR")
    output = resume or output or runs.default_output(settings)
    live: AbstractContextManager[Watch] = (
        nullcontext(SILENT) if choose(log_format, sys.stderr) else Live(console, settings)
    )
    with endpoint(metrics_port, metrics_address, _metrics_of(output)), live as watch:
        if resume is not None:
            result = runs.resume(resume, rounds=rounds, execution=execution, watch=watch)
        else:
            result = runs.simulate(settings, output, execution=execution, watch=watch)
    if as_json:
        print(json.dumps(_as_json(result)))
        return
    out = Console()
    out.print(final_table(result))
    if profile:
        out.print(profile_table(profile_of(Path(result["report_path"]).parent)))
    for line in closing_lines(result):
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def _metrics_of(folder: Path) -> Callable[[], Iterable[Metric]]:
    from .server.watching.snapshot import RunReader

    reader = RunReader(folder)

    def collect() -> Iterable[Metric]:
        from .server.watching.prometheus import run_metrics

        return run_metrics(reader.look())

    return collect


def _resumed_config(folder: Path, config: str, overrides: list[str], output: Path | None) -> tuple[Any, int | None]:
    """A run goes on as it was begun; only its number of rounds may change."""
    from .core.config import config_from_json
    from .server.rundir import read_run
    from .simulations.scenario import load_scenario

    if output is not None:
        raise UserError("--resume goes on in its own directory; leave out --output")
    before = config_from_json(json.dumps(read_run(folder)["config"]), f"{folder}/run.json")
    changes = {"rounds": before.rounds}
    if config:
        given = load_scenario(config, overrides)
        changes["rounds"] = given.rounds
        for key, value in given.model_dump(mode="json").items():
            if key not in ("rounds", "name") and value != before.model_dump(mode="json")[key]:
                raise UserError(f"--resume {folder}: the run was begun with another `{key}`; only rounds may change")
    elif overrides:
        for assignment in overrides:
            key, _, value = assignment.partition("=")
            if key.strip() != "rounds" or not value.strip().isdecimal() or not int(value):
                raise UserError(f"--resume with --set {assignment}: only rounds=NUMBER may change")
            changes["rounds"] = int(value)
    return before.model_copy(update=changes), changes["rounds"]


def _as_json(run: dict[str, Any]) -> dict[str, Any]:
    keep = (
        "run",
        "name",
        "engine",
        "digest",
        "accuracy",
        "loss",
        "rounds",
        "bytes_up",
        "bytes_down",
        "seconds",
        "warnings",
    )
    sites = {
        name: {
            key: site[key] for key in ("records", "units", "epsilon", "delta", "unit", "accuracy", "accuracy_before")
        }
        for name, site in run["sites"].items()
    }
    return {
        **{key: run[key] for key in keep},
        "strategy": run["strategy"]["name"],
        "method": run["method"]["name"],
        "bytes_full_model": run["bytes_full_model"],
        "sites": sites,
        "adapter": run["adapter_path"],
        "report": run["report_path"],
    }


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html anew."""
    from .server.report import write_report

    print(write_report(folder))


@app.command()
def top(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a kit.", show_default=False)] = Path(),
    kit: Annotated[Path | None, typer.Option("--kit", help="The folder of a server's or a site's kit.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one page and end.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.2, help="Between two looks.")] = 2.0,
) -> None:
    """Watch a run, a server or a site in the terminal, until Ctrl-C."""
    from .core.watching.screen import show

    show(page_of(kit or folder), once=once, seconds=seconds)


def page_of(folder: Path) -> Callable[[], RenderableType]:
    """What draws the page of a server's kit, a site's kit, or a run directory, which need not be there yet."""
    from .deployment.kits import ServerKit, SiteKit

    if (folder / "server.toml").is_file():
        from .server.watching.deployment import KitReader
        from .server.watching.page import kit_page

        server = KitReader(ServerKit.open(folder))
        return lambda: kit_page(server.look())
    if (folder / "site.toml").is_file():
        from .client.watching.page import site_page
        from .client.watching.snapshot import SiteReader

        at_site = SiteReader(SiteKit.open(folder))
        return lambda: site_page(at_site.look())
    from .server.watching.page import run_page
    from .server.watching.snapshot import RunReader

    run = RunReader(folder)
    return lambda: run_page(run.look())


@app.command("profile")
def show_profile(
    folder: Annotated[Path, typer.Argument(help="The directory of a run made with --profile.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Tell each round by itself too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell where the time of a run went."""
    from .simulations.timing import profile_of, profile_table, rounds_table

    found = profile_of(folder)
    if as_json:
        print(json.dumps(found))
        return
    Console().print(profile_table(found))
    if rounds:
        Console().print(rounds_table(found))


@app.command()
def doctor() -> None:
    """Check versions, device, offline assets, and that privacy works on this machine."""
    from .simulations.doctor import checks

    table = Table("check", "", "found")
    failed = 0
    for name, good, found in checks():
        failed += not good
        table.add_row(name, "[green]ok[/]" if good else "[red]no[/]", escape(found))
    Console().print(table)
    if failed:
        raise UserError(f"{failed} of the checks failed")


app.command("export")(export)
app.command("audit")(audit)
app.command("merge")(merge)
app.command("embed")(embed)
app.command("route")(route)
app.command("attack")(attack)
app.command("sweep")(sweep)
app.command("compare")(compare)
