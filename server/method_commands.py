"""`fedgraft methods`: what there is, what one of them trains and costs, and which to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..core.errors import UserError

app = typer.Typer(help="The PEFT methods: list them, show one, find the one to take.", add_completion=False)

Model = Annotated[str, typer.Option(help="A model folder or hub name, of which only the configuration is read.")]
Labels = Annotated[int, typer.Option(min=2, help="Classes of the task's head.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _list(
    context: typer.Context,
    kind: Annotated[str, typer.Option(help="Only one kind, such as adapter, prompt, partial, low-rank.")] = "",
    model: Model = "",
    labels: Labels = 2,
    as_json: Json = False,
) -> None:
    """List the PEFT methods; with --model, how much each trains on it."""
    if context.invoked_subcommand is not None:
        return
    from ..methods import methods
    from .method_card import row

    known = [method for method in methods() if method.kind == (kind or method.kind)]
    if not known:
        kinds = sorted({method.kind for method in methods()})
        raise UserError(f"no method is of the kind `{kind}`; there are {', '.join(kinds)}")
    rows = [row(method) for method in known]
    counted = _counted(known, model, labels) if model else {}
    for entry in rows:
        if entry["name"] in counted:
            found = counted[entry["name"]]
            numbers = {"adapter": found.adapter, "head": found.head, "frozen": found.frozen}
            entry["count"] = {"refused": found.refused} if found.refused else numbers
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", *(["trains"] if model else []), "what it does", "privacy", box=SIMPLE_HEAD)
    for entry in rows:
        cells = [entry["name"], escape(entry["refused"] or entry["summary"]), escape(_privacy(entry))]
        if model:
            size = entry.get("count", {})
            cells.insert(1, "" if "adapter" not in size else short(size["adapter"]))
        table.add_row(*cells, style="dim" if entry["refused"] or "refused" in entry.get("count", {}) else "")
    console = Console()
    console.print(table)
    if model:
        console.print(f"trains: numbers beside the head, with the method's defaults on {escape(model)}")
    console.print("More of one: fedgraft methods show NAME")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method.")],
    model: Model = "",
    labels: Labels = 2,
    rank: Annotated[int, typer.Option(min=1, help="Rank, where the method has one.")] = 8,
    as_json: Json = False,
) -> None:
    """Show a method's equation, what averaging and privacy do to it, its options, and what it trains on a model."""
    from .method_card import card
    from .traffic import skeleton

    found = card(name, skeleton(model, labels), rank=rank, alpha=2.0 * rank)
    if as_json:
        print(json.dumps(found, default=str))
        return
    out = Console(highlight=False)
    out.print(f"[bold]{escape(found['name'])}[/]  {escape(found['summary'])}")
    if found["refused"]:
        out.print(f"[red]cannot be trained:[/] {escape(found['refused'])}")
    for key in ("equation", "federates", "privacy", "source"):
        if found[key]:
            out.print(f"{key:11}{escape(found[key])}")
    if found["refused"]:
        return
    if found["dp"] != "exact":
        out.print(f"{'':11}{escape(found['dp'])}")
    out.print(f"{'merges':11}{'into the base weights' if found['merges'] else 'no: it stays beside the base model'}")
    if found["accepts"]:
        out.print(f"{'takes':11}{', '.join('method.' + key for key in found['accepts'])}")
    if found["options"]:
        table = Table("method.options", "kind", "default", "")
        for option in found["options"]:
            default = json.dumps(option["default"], default=str)
            table.add_row(option["name"], escape(option["kind"]), escape(default), escape(option["description"]))
        out.print(table)
    if "count" in found:
        _print_count(out, found)


@app.command()
def mask(
    name: Annotated[str, typer.Argument(help="fish, child-tuning-d, sam, lt-sft, lora-prune, s-bitfit or u-bitfit.")],
    job: Annotated[Path, typer.Argument(help="The job file, with the model and the task.")],
    data: Annotated[Path, typer.Option(help="Records that everyone may see; none of them a patient's.")],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the weights in linear layers that shall train, 0.005 unless set; for lora-prune, of the "
            "heads and channels that stay (0.5); for the BitFits, of the biases' numbers (0.1)."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("mask.safetensors"),
) -> None:
    """Choose the weights that a method trains or keeps, by records that everyone may see; every site gets the file."""
    from ..core.config import load_config
    from ..core.records import read_table
    from ..core.tasks import create_task
    from ..methods.importance import KEEP, mask_of, save_mask

    config = load_config(job)
    table = read_table(data, config, trains=False)
    task = create_task(config.task)
    base = task.load(config.model, config.task, config.seed)
    labels = None if table.labels is None else table.labels.tolist()
    examples = task.encode(table.inputs, labels, base.processor)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        going = bar.add_task("scoring the weights", total=None)
        share = KEEP.get(name, 1.0) if keep is None else keep
        found = mask_of(name, base, task, examples, share, lambda done, of: bar.update(going, completed=done, total=of))
    save_mask(output, found)
    count = sum(len(places) for places in found.values())
    biases = dict.fromkeys(("s-bitfit", "u-bitfit"), "numbers of biases")
    what = {"lora-prune": "rows and columns that stay", **biases}.get(name, "weights")
    print(f"{output}: {count:,} {what} in {len(found)} layers, chosen by {len(examples):,} records")
    print(f'use it:  [method] name = "{name}", mask = "{output}"')
    print("It tells of these records, without noise: no patient's may be among them.")


def _print_count(out: Console, found: dict[str, Any]) -> None:
    size, model = found["count"], found["model"]
    if "refused" in size:
        out.print(f"On {escape(model['name'])}: {escape(size['refused'])}")
        return
    frozen = f", {size['frozen']:,} frozen ones cross once" if size["frozen"] else ""
    out.print(
        f"On {escape(model['name'])}: {size['adapter']:,} numbers and {size['head']:,} of the head train, "
        f"{size['percent']:.3g} % of {model['parameters']:,}; {size_of(size['bytes_up_round'])} a site and round"
        f"{frozen}."
    )


def _counted(known: Any, model: str, labels: int) -> Any:
    from .method_card import counts
    from .traffic import skeleton

    on = skeleton(model, labels)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("counting", total=len(known))
        return counts(known, on, lambda name: bar.update(task, advance=1, description=name))


def _privacy(entry: dict[str, Any]) -> str:
    return "" if entry["refused"] else "exact" if entry["dp"] == "exact" else "refused"


def short(number: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def size_of(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
