"""`fedgraft strategies`: what there is, what one of them does and costs, and the beginnings of a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..strategies import strategies

app = typer.Typer(help="The aggregation strategies: list them, show one, begin a new one.", add_completion=False)


@app.callback(invoke_without_command=True)
def _list(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all flags and options.")] = False,
) -> None:
    """List the aggregation strategies."""
    if context.invoked_subcommand is not None:
        return
    from .strategy_card import row

    rows = [row(name, cls) for name, cls in strategies().items()]
    if as_json:
        print(json.dumps(rows, default=str))
        return
    table = Table("name", "rule", "exact", "sum", "mixed ranks", box=SIMPLE_HEAD)
    for entry in rows:
        can = entry["capabilities"]
        flags = (_yes(can[flag]) for flag in ("exact", "linear_sum", "heterogeneous_ranks"))
        table.add_row(entry["name"], escape(entry["summary"]), *flags)
    console = Console()
    console.print(table)
    console.print("sum: works under central privacy and a secure sum. More: fedgraft strategies show NAME")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A strategy, or flwr:NAME for one of Flower's.")],
    model: Annotated[str, typer.Option(help="A model folder or hub name; without it, BERT-base.")] = "",
    method: Annotated[str, typer.Option(help="A PEFT method; without it, LoRA or what the strategy needs.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    labels: Annotated[int, typer.Option(min=2, help="Classes of the task's head.")] = 2,
    sites: Annotated[int, typer.Option(min=1, help="Sites of the federation that is counted.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a strategy's rule, what it can do, its options, and the bytes that it sends for a model."""
    from .strategy_card import card

    found = card(name, model=model, method=method, rank=rank, labels=labels, sites=sites)
    if as_json:
        print(json.dumps(found, default=str))
        return
    _print(found)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the strategy shall be called, such as my-mean.")],
    folder: Annotated[Path, typer.Option(help="Where its package is made.")] = Path(),
) -> None:
    """Write a package with a strategy to begin from, and its test."""
    from .strategy_package import write_package

    made = write_package(name, folder)
    print(made)
    print(f"  try it:      cd {made} && python -m pytest")
    print(f'  install it:  pip install --no-deps -e {made}    then: strategy = "{name}"')


def _print(found: dict[str, Any]) -> None:
    from .strategy_card import in_words

    out = Console(highlight=False)
    out.print(f"[bold]{escape(found['name'])}[/]  {escape(found['summary'])}")
    for key in ("equation", "source"):
        if found[key]:
            out.print(f"{key:10}{escape(found[key])}")
    if found["description"]:
        out.print()
        out.print(escape(found["description"]))
    out.print()
    for line in in_words(found["capabilities"]):
        out.print(f"- {escape(line)}")
    out.print()
    able = Table("works with", "")
    for key, reason in found["works_with"].items():
        able.add_row(key, escape(f"no: {reason}") if reason else "yes")
    out.print(able)
    if found["options"]:
        table = Table("option", "kind", "default", "")
        for option in found["options"]:
            default = "(needed)" if option["required"] else json.dumps(option["default"], default=str)
            table.add_row(option["name"], escape(option["kind"]), escape(default), escape(option["description"]))
        out.print(table)
    else:
        out.print("It has no options.")
    _print_traffic(out, found["traffic"])


def _print_traffic(out: Console, found: dict[str, Any]) -> None:
    rank = f" of rank {found['rank']}" if found["rank"] else ""
    given = "".join(f", {key} = {value}" for key, value in found.get("options", {}).items())
    numbers = f"{found['adapter']:,} numbers{given}"
    out.print(f"\n{escape(found['method'])}{rank} on {escape(found['model'])}: {escape(numbers)}")
    if "refused" in found:
        out.print(escape(found["refused"]))
        return
    table = Table(
        f"tensors in fp32, each of {found['sites']} sites",
        *(f"round {number}" for number in range(1, len(found["up"]) + 1)),
    )
    for way in ("up", "down"):
        table.add_row(way, *(_size(count) for count in found[way]))
    out.print(table)
    out.print(f"The whole model would be {_size(found['full_model'])} each way.")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
