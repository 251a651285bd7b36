"""`fedgraft sweep` and `fedgraft compare`: what they take and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ...core.errors import UserError
from .watching import Watching

_FAILED = 1
_WIDE = 140


def sweep(
    config: Annotated[str, typer.Argument(help="A TOML file, or a scenario that comes with fedgraft.")] = "",
    grid: Annotated[list[str] | None, typer.Option(help="key=value,value: all combinations are run.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, from the configuration's seed on.")] = 1,
    baselines: Annotated[str, typer.Option(help="To compare with: none, local, central, full; see the docs.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, for all runs.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the sweep (default: sweeps/NAME-DIGEST).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep in this folder.")] = None,
    parallel: Annotated[
        int, typer.Option(min=0, help="Processes, each with a run at a time; 0: one a GPU or core.")
    ] = 0,
    skip_refused: Annotated[bool, typer.Option("--skip-refused", help="Leave out points that cannot run.")] = False,
    engine: Annotated[str, typer.Option(help="auto, inprocess, workers, or flower (Flower's runtime).")] = "inprocess",
    threads: Annotated[int, typer.Option(help="Threads of each process; 0: cores divided by processes.")] = 0,
    cohort: Annotated[int, typer.Option(help="Sites that train in one pass; 0: what a measurement finds.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json and nothing else.")] = False,
) -> None:
    """Run all combinations of a grid over several seeds, baselines beside them; stopped, the same command goes on.

    Exit code 1 when a run failed.
    """
    from ..execution import Execution
    from .grid import Axis
    from .plan import make
    from .run import carry_on, default_folder, run_sweep
    from .table import notes, terminal_table

    execution = Execution(engine, threads=threads, cohort=cohort)  # type: ignore[arg-type]
    console = Console(stderr=True)
    with _Live(console) as live:
        if resume is not None:
            if config or grid or overrides or baselines or output or skip_refused or seeds != 1:
                raise UserError("--resume goes on with a sweep as it was begun; leave out all that says what to run")
            outcome = carry_on(resume, parallel=parallel, execution=execution, watch=live)
        else:
            if not config:
                raise UserError("say what to run: a configuration file, a scenario, or --resume DIR")
            planned = make(
                config,
                [Axis.parse(text) for text in grid or []],
                overrides=overrides or [],
                seeds=seeds,
                baselines=[name.strip() for name in baselines.split(",") if name.strip()],
                skip_refused=skip_refused,
                watch=live.checked,
            )
            folder = output or default_folder(planned)
            outcome = run_sweep(planned, folder, parallel=parallel, execution=execution, watch=live)
    if as_json:
        print((outcome.folder / "results.json").read_text(encoding="utf-8"), end="")
    else:
        out = _wide()
        out.print(terminal_table(outcome.results))
        for line in (*notes(outcome.results), *_where(outcome.folder)):
            out.print(line, soft_wrap=True, highlight=False, markup=False)
    if any(row["status"] != "finished" and row["status"] != "refused" for row in outcome.results.rows):
        raise typer.Exit(_FAILED)


def _wide() -> Console:
    """Standard output; a file or a pipe has room for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _WIDE))


def _where(folder: Path) -> list[str]:
    return [f"results  {folder / 'results.csv'}", f"report   {folder / 'report.html'}"]


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, finished or not.")],
    output: Annotated[Path | None, typer.Option(help="Write FILE.html, .svg, .md or .csv instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show runs side by side: what differs in their settings, what came out, and whether their adapters are equal."""
    from .compare import Comparison, as_table, write

    comparison = Comparison.of(runs)
    if output is not None:
        print(write(comparison, output))
    if as_json:
        print(json.dumps(comparison.to_dict()))
    elif output is None:
        out = _wide()
        out.print(as_table(comparison))
        for line in comparison.notes:
            out.print(line, soft_wrap=True, highlight=False, markup=False)


class _Live(Watching):
    """One bar over the sweep, and a line for each run that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._checks = self._progress.add_task("checking every point", total=None)
        self._runs: Any = None
        self._going: list[str] = []
        self._ended = self._total = 0

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def checked(self, done: int, total: int) -> None:
        self._progress.update(self._checks, completed=done, total=total)

    def started(self, total: int, left: int, processes: int) -> None:
        self._progress.remove_task(self._checks)
        self._total, self._ended = total, total - left
        if self._ended:
            self._say(f"{self._ended} of {total} runs are finished already")
        self._say(f"{left} runs on {processes} process{'es' if processes > 1 else ''}")
        self._runs = self._progress.add_task("", total=left)

    def begun(self, name: str) -> None:
        self._going.append(name)
        self._describe()

    def ended(self, row: dict[str, Any]) -> None:
        name = Path(row["path"]).name
        self._going.remove(name)
        self._ended += 1
        self._describe()
        self._progress.advance(self._runs)
        self._say(f"{self._ended}/{self._total}  {name}  {told(row)}", "red" if row["status"] == "failed" else "")

    def _describe(self) -> None:
        others = f" and {len(self._going) - 1} more" if len(self._going) > 1 else ""
        self._progress.update(self._runs, description=f"{self._going[0]}{others}" if self._going else "")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)


def told(row: dict[str, Any]) -> str:
    """What is said of a run that has ended."""
    from ..display import percent

    if row["status"] == "failed":
        return f"failed: {row['error']}"
    parts = [f"accuracy {percent(row['accuracy'])}"]
    if row["epsilon"] is not None:
        parts.append(f"ε ≤ {row['epsilon']:.2f}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])
