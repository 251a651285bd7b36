"""`fedgraft privacy`: the trade-off before a run, and the ledger after it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.config import RunConfig, load_config, parse_config
from ..core.errors import UserError
from .accounting import Event, calibrate_noise, require_known
from .accounting import epsilon as spent_epsilon
from .ledger_commands import app as ledger
from .tradeoff import Choice, Tradeoff, draw, tradeoff

app = typer.Typer(help="Plan a privacy budget, and look at what was spent.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

#: The most noise that `privacy noise` looks for; a run is refused far below it.
_MOST_NOISE = 1e4
_PLOT = Path("privacy-plan.png")
_RELATION = {"add_remove": "add/remove", "replace_one": "replace one"}
_SAMPLING = {
    "poisson": "each by its own coin",
    "truncated_poisson": "each by its own coin, at most",
    "cyclic": "each in its turn, surely",
}

_Rate = Annotated[float, typer.Option(help="Chance of a unit to be in a step: batch / units.")]
_Steps = Annotated[int, typer.Option(help="Steps in all: rounds x local steps.")]
_Delta = Annotated[float, typer.Option(help="Below 1 / units.")]
_Neighbours = Annotated[str, typer.Option(help="add_remove or replace_one.")]
_Accountant = Annotated[str, typer.Option(help="pld (tight) or rdp (looser).")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def epsilon(
    noise: Annotated[float, typer.Option(help="Noise multiplier: std of the noise over the clip.")],
    rate: _Rate,
    steps: _Steps,
    delta: _Delta,
    neighbours: _Neighbours = "add_remove",
    accountant: _Accountant = "pld",
    check: Annotated[bool, typer.Option("--check", help="Hold it against a second, independent computation.")] = False,
    as_json: _Json = False,
) -> None:
    """What so many sampled Gaussian steps spend."""
    _require(noise > 0 and math.isfinite(noise), f"--noise {noise:g}: it must be a positive number")
    _require_sampling(rate, steps, delta)
    event = Event(noise, rate, steps)
    value = spent_epsilon((event,), delta, neighbours, accountant)
    _require(
        math.isfinite(value), f"--noise {noise:g}: so little over {steps:,} steps that there is no epsilon to tell"
    )
    told: dict[str, Any] = {"epsilon": value, "noise": noise}
    _add_settings(told, rate, steps, delta, neighbours, accountant)
    if check:
        from .losses import check_epsilon

        try:
            checked = check_epsilon((event,), delta, neighbours)
        except ValueError as error:
            raise UserError(f"--check: {error}") from None
        told["check"] = {"estimate": checked.estimate, "least": checked.least}
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"epsilon {_upwards(value)} at delta {delta:g}: noise {noise:g}, rate {rate:g}, {steps:,} steps "
        f"({_RELATION[neighbours]}, {accountant})"
    )
    if check:
        print(f"an independent computation gives {checked.estimate:.5g}, and surely not below {checked.least:.5g}")


@app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="The budget.")],
    rate: _Rate,
    steps: _Steps,
    delta: _Delta,
    neighbours: _Neighbours = "add_remove",
    accountant: _Accountant = "pld",
    as_json: _Json = False,
) -> None:
    """The least noise multiplier that keeps so many sampled Gaussian steps within a budget."""
    _require(epsilon > 0 and math.isfinite(epsilon), f"--epsilon {epsilon:g}: it must be a positive number")
    _require_sampling(rate, steps, delta)
    require_known(neighbours, accountant)
    least = calibrate_noise(epsilon, delta, rate, steps, (), neighbours, accountant, most=_MOST_NOISE)
    value = spent_epsilon((Event(least, rate, steps),), delta, neighbours, accountant)
    told: dict[str, Any] = {"noise": least, "epsilon": value}
    _add_settings(told, rate, steps, delta, neighbours, accountant)
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"noise {_upwards(least)}, which spends epsilon {_upwards(value)} of {epsilon:g} at delta {delta:g}: rate "
        f"{rate:g}, {steps:,} steps ({_RELATION[neighbours]}, {accountant})"
    )


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="A run's TOML file; without one, the options say it all.")
    ] = None,
    units: Annotated[
        int | None, typer.Option(help="Records or patients of the site (default without a file: 1000).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Units a step, on average (default: an eighth of them).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the run.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps a round.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget of the whole run.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="Default: a tenth of 1 / units, rounded down to a power of ten.")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="A noise multiplier, instead of the least that will do.")] = None,
    unit: Annotated[str | None, typer.Option(help="record or patient.")] = None,
    neighbours: Annotated[str | None, typer.Option(help="add_remove or replace_one.")] = None,
    accountant: Annotated[str | None, typer.Option(help="pld or rdp.")] = None,
    sampler: Annotated[str | None, typer.Option(help="poisson, truncated_poisson or cyclic.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most units a step, for truncated_poisson.")] = None,
    bands: Annotated[int | None, typer.Option(help="Correlate the noise of so many steps.")] = None,
    output: Annotated[Path | None, typer.Option(help=f"The plot (default: {_PLOT}; with --json: none).")] = None,
    as_json: _Json = False,
) -> None:
    """What a site can promise, and what it costs: epsilon against noise, batch and rounds."""
    given = {
        "rounds": rounds,
        "train.batch_size": batch,
        "train.local_steps": local_steps,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "privacy.noise_multiplier": noise,
        "privacy.unit": unit,
        "privacy.neighbours": neighbours,
        "privacy.accountant": accountant,
        "privacy.sampler": sampler,
        "privacy.max_batch": max_batch,
        "privacy.bands": bands,
    }
    run, size = _run(config, units, {key: value for key, value in given.items() if value is not None})
    found = tradeoff(run, size)
    path = output or (None if as_json else _PLOT)
    if path is not None:
        draw(found, path)
    if as_json:
        print(json.dumps(_as_json(found, run, path)))
        return
    console = Console()
    console.print(_facts(found, run))
    console.print(_choices(found))
    console.print(f"plot: {path}", markup=False, highlight=False, soft_wrap=True)


def _require(good: bool, refusal: str) -> None:
    if not good:
        raise UserError(refusal)


def _require_sampling(rate: float, steps: int, delta: float) -> None:
    _require(0 < rate <= 1, f"--rate {rate:g}: it must be above 0 and at most 1 (batch / units)")
    _require(steps >= 1, f"--steps {steps}: there must be at least one")
    _require(0 < delta < 1, f"--delta {delta:g}: it must be between 0 and 1, and below 1 / units")


def _add_settings(
    told: dict[str, Any], rate: float, steps: int, delta: float, neighbours: str, accountant: str
) -> None:
    told.update(rate=rate, steps=steps, delta=delta, neighbours=neighbours, accountant=accountant)


def _run(path: Path | None, units: int | None, given: dict[str, Any]) -> tuple[RunConfig, int]:
    """The run to plan and the size of the site: the file's, with what was ``given`` in its place."""
    if path is not None:
        if units is None:
            raise UserError(f"{path}: say with --units how many records or patients the site has")
        return load_config(path, [f"{key}={value}" for key, value in given.items()]), units
    size = 1000 if units is None else units
    _require(size >= 1, f"--units {size}: a site has at least one")
    defaults = {
        "train.batch_size": max(1, size // 8),
        "privacy.delta": 10.0 ** -math.ceil(math.log10(10 * size)),
    }
    values: dict[str, Any] = {"model": "none", "data": {"sites": ["site"]}}
    for key, value in {**defaults, **given}.items():
        *section, leaf = key.split(".")
        (values.setdefault(section[0], {}) if section else values)[leaf] = value
    return parse_config(values, "privacy plan"), size


def _upwards(value: float) -> str:
    """Four digits, rounded up: what is shown is never below the truth."""
    if math.isinf(value):
        return "beyond all"
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(value))):g}"


def _facts(found: Tradeoff, run: RunConfig) -> Table:
    """The plan in words."""
    plan = found.plan
    change = "replaced" if plan.neighbours == "replace_one" else "added or removed"
    sampling = f"{plan.expected_batch:,} of {plan.units:,} {plan.unit}s a step, {_SAMPLING[plan.sampler]}"
    if plan.max_batch:
        sampling += f" {plan.max_batch:,}"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in (
        ("promise", f"epsilon {plan.epsilon:g} at delta {plan.delta:g}, any one {plan.unit} {change}"),
        ("steps", f"{run.rounds:,} rounds x {run.train.local_steps:,} = {plan.steps:,}"),
        ("sampling", sampling),
        (
            "noise",
            f"{_upwards(plan.noise_multiplier)} x clip, which spends epsilon {_upwards(plan.final_epsilon)} "
            f"({plan.accountant})",
        ),
        ("on the mean", f"{_upwards(found.on_the_mean)} x clip on each coordinate of a step's mean gradient"),
        ("delta", f"{plan.delta * plan.units:.2g} of 1/{plan.units:,}, the chance of naming somebody outright"),
    ):
        table.add_row(name, text)
    if plan.bands > 1:
        from .correlated import prefix_error

        less = math.sqrt(prefix_error(1, plan.steps)[1] / prefix_error(plan.bands, plan.steps)[1])
        table.add_row("correlated", f"over {plan.bands} steps: the noise in the run's sums is {less:.2g} times less")
    return table


def _choices(found: Tradeoff) -> Table:
    """The plan's neighbours on each axis."""
    plan = found.plan
    table = Table(title="\nOne setting changed", title_justify="left", caption="* as planned", caption_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("to", justify="right")
    table.add_column(f"epsilon at noise {plan.noise_multiplier:.3g}", justify="right")
    table.add_column(f"noise for epsilon {plan.epsilon:g}", justify="right")
    table.add_column("noise on the mean, x clip", justify="right")
    for one in found.noise:
        table.add_row(_starred("noise", one), f"{one.value:.3g}", _or(one.epsilon), "", _or(one.on_the_mean))
    for name, rows in (("batch", found.batch), ("rounds", found.rounds)):
        table.add_section()
        for one in rows:
            table.add_row(
                _starred(name, one),
                f"{one.value:,.0f}",
                _or(one.epsilon, "refused"),
                _or(one.needed, "" if one.epsilon is None else "out of reach"),
                _or(one.on_the_mean),
            )
    return table


def _starred(name: str, choice: Choice) -> str:
    return f"{name} *" if choice.planned else name


def _or(value: float | None, none: str = "") -> str:
    return none if value is None else _upwards(value)


def _as_json(found: Tradeoff, run: RunConfig, plot: Path | None) -> dict[str, Any]:
    plan = found.plan
    return {
        "epsilon": plan.final_epsilon,
        "budget": plan.epsilon,
        "delta": plan.delta,
        "noise": plan.noise_multiplier,
        "on_the_mean": found.on_the_mean,
        "unit": plan.unit,
        "units": plan.units,
        "batch": plan.expected_batch,
        "rounds": run.rounds,
        "steps": plan.steps,
        "sampler": plan.sampler,
        "neighbours": plan.neighbours,
        "accountant": plan.accountant,
        "bands": plan.bands,
        "tradeoff": {
            name: [asdict(one) for one in rows]
            for name, rows in (("noise", found.noise), ("batch", found.batch), ("rounds", found.rounds))
        },
        "plot": None if plot is None else str(plot),
    }
