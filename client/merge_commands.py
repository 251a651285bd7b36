"""`fedgraft merge`: make one adapter of several, PEFT folders in, one PEFT folder out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.errors import UserError

if TYPE_CHECKING:
    from ..core.adapter import AdapterSpec, AdapterState
    from ..core.config import RunConfig
    from ..methods.peftfolder import PeftFolder
    from ..strategies.merging import Adapter, Context, Merged, Merger

#: The rank that an adapter of another type is converted to where no LoRA adapter says one.
_CONVERTED_RANK = 16
RECORD, PICTURE = "merge.json", "explain.png"


def merge(
    rule: Annotated[str, typer.Argument(help="How to merge: see fedgraft merge --list.", show_default=False)] = "",
    folders: Annotated[
        list[Path] | None, typer.Argument(help="PEFT adapter folders, or run directories.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder for the merged adapter.", show_default=False)] = None,
    weights: Annotated[str, typer.Option(help="One positive number a folder, with commas (default: all 1).")] = "",
    option: Annotated[list[str] | None, typer.Option(help="key=value, an option of the rule.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the merged adapter (default: the largest).")] = None,
    heads: Annotated[str, typer.Option(help="Task heads: mean, first (keep the first's), or none.")] = "mean",
    model: Annotated[str, typer.Option(help="The base model, where a rule or another PEFT type needs it.")] = "",
    data: Annotated[Path | None, typer.Option(help="A few records of your own, for rules that need them.")] = None,
    config: Annotated[Path | None, typer.Option(help="A configuration that says the task of --data.")] = None,
    labels: Annotated[str, typer.Option(help="The labels of --data in order, where nothing else says them.")] = "",
    force: Annotated[str, typer.Option(help="Take adapters of the base model of this name too.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of what a rule draws.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which adapter got which weight, and draw it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    list_rules: Annotated[bool, typer.Option("--list", help="List the rules and their options.")] = False,
) -> None:
    """Make one adapter of several that were trained apart."""
    if list_rules:
        _list(as_json)
        return
    if not rule:
        raise UserError("say how to merge: fedgraft merge RULE FOLDER FOLDER --output DIR; see fedgraft merge --list")
    if not folders:
        raise UserError("name the adapter folders to merge")
    if output is None:
        raise UserError("say where the merged adapter goes: --output DIR")
    if heads not in ("mean", "first", "none"):
        raise UserError(f"--heads {heads}: there are mean, first and none")
    from ..methods.peftfolder import write_folder
    from ..strategies.merging import create_merger

    started = time.perf_counter()
    chosen = create_merger(rule, _options(option or []))
    read = _read(folders, model, rank)
    _require_one_base(read, force)
    _require_one_label_set(read, heads)
    job = _Job(read, _weights(weights, read), chosen, heads, rank, seed)
    merged = job.merge(_Records.of(data, config, model, labels, read, chosen) if data else None)
    place = write_folder(output, merged.state, next(iter(read.values())), heads != "none")
    result = _result(rule, chosen, read, merged, place, time.perf_counter() - started)
    (place / RECORD).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if explain:
        _draw(merged, rule, place / PICTURE)
    if as_json:
        print(json.dumps(result))
        return
    _show(result, merged, explain)


def _list(as_json: bool) -> None:
    from ..strategies.merging import mergers

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": cls.summary,
            "equation": cls.equation,
            "source": cls.source,
            "needs": [key for key, needed in vars(cls.needs).items() if needed],
            "options": {
                key: {"default": f.default, "help": f.description} for key, f in cls.Options.model_fields.items()
            },
        }
        for name, cls in mergers().items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("rule", "what it does", "needs", "options")
    for row in rows:
        options = ", ".join(f"{key}={given['default']}" for key, given in row["options"].items())
        table.add_row(
            row["name"],
            escape(f"{row['summary']}\n{row['equation']}"),
            ", ".join(row["needs"]) or "nothing",
            escape(options),
        )
    Console().print(table)


def _options(assignments: Sequence[str]) -> dict[str, Any]:
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--option {assignment}: write key=value")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value.strip()
    return found


def _read(folders: Sequence[Path], model: str, rank: int | None) -> dict[str, PeftFolder]:
    """The adapters by name; those of another type are converted, to ``rank`` or the largest that a LoRA one has."""
    from ..methods.peftfolder import convert_folder, peft_type, read_folder

    kinds = [peft_type(folder) for folder in folders]
    found = {i: read_folder(folder) for i, folder in enumerate(folders) if kinds[i] == "LORA"}
    largest = max((held.state.spec.rank or 0 for held in found.values()), default=_CONVERTED_RANK)
    for i, folder in enumerate(folders):
        if i not in found:
            if not model:
                raise UserError(
                    f"{folder}: its type is {kinds[i]}; name its base model with --model to convert it to LoRA"
                )
            found[i] = convert_folder(folder, model, rank or largest)
    short = [_short(folder) for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
    if len(set(names)) != len(names):
        raise UserError(f"{next(n for n in names if names.count(n) > 1)}: is named twice; give it more weight instead")
    return {name: found[i] for i, name in enumerate(names)}


def _short(folder: Path) -> str:
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "adapter" else resolved.name


def _weights(text: str, read: Mapping[str, PeftFolder]) -> list[float]:
    if not text:
        return [1.0] * len(read)
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: write numbers with commas between them, such as 1,2,0.5") from None
    if len(found) != len(read):
        raise UserError(f"--weights {text}: gives {len(found)} weights for {len(read)} adapters")
    return found


def _require_one_base(read: Mapping[str, PeftFolder], force: str) -> None:
    """Raise unless all adapters are of one base model: by fingerprint where runs say it, else by name."""
    (_, first), *others = read.items()
    for name, other in others:
        same = first.base == other.base
        if first.fingerprint and other.fingerprint:
            same = first.fingerprint == other.fingerprint
        if not same and force != other.base:
            raise UserError(
                f"adapter {name}: is for the base model `{other.base}`, the first for `{first.base}`; if they are the "
                f"same model, add --force '{other.base}'"
            )


def _require_one_label_set(read: Mapping[str, PeftFolder], heads: str) -> None:
    (_, first), *others = read.items()
    for name, other in others:
        if heads == "mean" and first.labels and other.labels and first.labels != other.labels:
            how = "in another order than" if set(first.labels) == set(other.labels) else "others than"
            odd = next((a for a in other.labels if a not in first.labels), other.labels[0])
            raise UserError(
                f"adapter {name}: its labels (such as {odd}) are {how} the first's, so their heads have no mean; "
                "choose --heads first or --heads none"
            )


@dataclass(frozen=True)
class _Job:
    """One merge: adapters, rule and the shape of what comes out."""

    read: Mapping[str, PeftFolder]
    weights: Sequence[float]
    rule: Merger
    heads: str
    rank: int | None
    seed: int

    def merge(self, records: _Records | None) -> Merged:
        from ..strategies.merging import Adapter, Context
        from ..strategies.merging.mixing import common_spec

        keep = self.heads != "none"
        states = {name: folder.state if keep else _headless(folder.state) for name, folder in self.read.items()}
        if records is not None:
            states = {name: records.ordered(state) for name, state in states.items()}
        adapters = [Adapter(n, state, w) for (n, state), w in zip(states.items(), self.weights, strict=True)]
        heads: Any = "first" if self.heads == "first" else "mean"
        context = Context(common_spec(adapters, self.rank, heads), seed=self.seed, heads=heads)
        if records is not None:
            context = records.context(context, adapters)
        elif self.rule.needs.score or self.rule.needs.loss or self.rule.needs.labels or self.rule.needs.embeddings:
            raise UserError(f"rule `{self.rule.name}` needs a few records of your own: give --data FILE")
        elif self.rule.needs.grams or self.rule.needs.fisher:
            raise UserError(f"rule `{self.rule.name}` takes statistics of records: give --data FILE")
        return self.rule.merge(adapters, context)


def _headless(state: AdapterState) -> AdapterState:
    from ..core.adapter import AdapterState

    spec = replace(state.spec, tensors=tuple(t for t in state.spec.tensors if t.role != "head"))
    return AdapterState(spec, {name: state[name] for name in spec.names})


class _Records:
    """The merging side's own records, and the base model that they are shown to."""

    def __init__(self, config: RunConfig, path: Path, read: Mapping[str, PeftFolder], rule: Merger) -> None:
        from ..core.records import read_table
        from .composing.scoring import Scorer, encode, resident_for
        from .data import Records
        from .resident import resident

        self.config, self._read, self._needs = config, read, rule.needs
        # Where nothing but texts or inputs is looked at, nobody need have labelled them.
        labelled = not (rule.needs.embeddings or rule.needs.grams)
        table = read_table(path, config, trains=False, labels=labelled)
        self._records = Records(table.inputs, table.labels, table.patients)
        self.scorer = Scorer(config, self._records) if labelled else None
        self._resident_for, self._encode = resident_for, encode
        self._order = {name: i for i, name in enumerate(resident(config).adapter.fresh.names)}

    @classmethod
    def of(
        cls, data: Path, config: Path | None, model: str, labels: str, read: Mapping[str, PeftFolder], rule: Merger
    ) -> _Records:
        """Read the records as the configuration says, or the run that an adapter came of, or --model and --labels."""
        from ..core.config import PrivacyConfig, RunConfig, load_config

        first = next(iter(read.values()))
        if config is not None:
            found = load_config(config)
        elif (run := first.run) is not None:
            found = RunConfig.model_validate(run["config"])
        elif model and labels:
            targets = first.config.get("target_modules")
            found = RunConfig.model_validate(
                {
                    "model": model,
                    "method": {
                        "name": first.state.spec.method,
                        "target_modules": tuple(targets) if isinstance(targets, list) else (),
                    },
                    "task": {"labels": [label.strip() for label in labels.split(",")]},
                    "data": {"sites": ["merge"]},
                }
            )
        else:
            raise UserError(f"--data {data}: say its task: --config FILE, or --model NAME with --labels a,b,c")
        task = found.task
        if not task.labels and first.labels:
            task = task.model_copy(update={"labels": first.labels})
        # Nothing that records of the merging side's own are asked leaves it but with the merged adapter.
        changes = {"privacy": PrivacyConfig(enabled=False), "task": task, **({"model": model} if model else {})}
        return cls(found.model_copy(update=changes), data, read, rule)

    def ordered(self, state: AdapterState) -> AdapterState:
        """The same tensors in the order of the model's parameters."""
        from ..core.adapter import AdapterState

        tensors = sorted(state.spec.tensors, key=lambda tensor: self._order.get(tensor.name, len(self._order)))
        pairs = sorted(state.spec.pairs, key=lambda pair: self._order.get(pair.a, len(self._order)))
        spec = replace(state.spec, tensors=tuple(tensors), pairs=tuple(pairs))
        return AdapterState(spec, {name: state[name] for name in spec.names})

    def context(self, context: Context, adapters: Sequence[Adapter]) -> Context:
        needs, scorer = self._needs, self.scorer
        if scorer is not None:
            context = replace(context, score=scorer.accuracy, loss=scorer.loss, labels=scorer.labels)
        if needs.embeddings:
            context = self._embedded(context)
        if needs.fisher or needs.grams:
            context = self._measured(context, adapters, needs.fisher)
        return context

    def _embedded(self, context: Context) -> Context:
        """The embeddings that the adapters came with, and those of the records."""
        from .composing.embeddings import Profile, embed

        model = self._resident_for(self.config, context.spec)
        profiles = {name: Profile.load(held.path, model.base.fingerprint) for name, held in self._read.items()}
        return replace(
            context,
            embeddings={name: profile.mean[None] for name, profile in profiles.items()},
            noise={name: profile.noise for name, profile in profiles.items()},
            texts=embed(model, self._encode(model, self._records), self.config),
        )

    def _measured(self, context: Context, adapters: Sequence[Adapter], fisher: bool) -> Context:
        """Statistics of each adapter on the merging side's own records, as those it was trained on are not here."""
        from .composing import statistics

        found: dict[str, Any] = {}
        for adapter in adapters:
            model = self._resident_for(self.config, adapter.state.spec)
            examples = self._encode(model, self._records)
            if fisher:
                found[adapter.name] = statistics.fisher(model, adapter.state, examples, self.config)
            else:
                found[adapter.name] = statistics.grams(model, adapter.state, examples, self.config)
        return replace(context, fisher=found) if fisher else replace(context, grams=found)


def _result(
    rule: str, merger: Merger, read: Mapping[str, PeftFolder], merged: Merged, place: Path, seconds: float
) -> dict[str, Any]:
    spec: AdapterSpec = merged.state.spec
    first = next(iter(read.values()))
    warnings = [
        f"adapter {name}: made LoRA of {folder.config.get('r')} with a relative error of {folder.lost:.3g}"
        for name, folder in read.items()
        if folder.lost > 0
    ]
    if spec.method == "dora":
        warnings.append("DoRA's magnitudes are averaged apart from dW, which is an approximation")
    if text := merger.warning(any(folder.private for folder in read.values())):
        warnings.append(text)
    return {
        "rule": rule,
        "equation": merger.equation,
        "options": merger.options.model_dump(mode="json"),
        "output": str(place),
        "base": first.base,
        "rank": spec.rank,
        "parameters": spec.parameters,
        "lost": merged.lost,
        "adapters": [
            {
                "name": name,
                "folder": str(folder.path),
                "rank": folder.state.spec.rank,
                "weight": merged.weights[name],
                "reason": merged.reasons[name],
            }
            for name, folder in read.items()
        ],
        "notes": list(merged.notes),
        "warnings": warnings,
        "seconds": round(seconds, 3),
    }


def _show(result: Mapping[str, Any], merged: Merged, explain: bool) -> None:
    console = Console()
    if explain:
        table = Table("adapter", "rank", "weight", "why", title=escape(f"{result['rule']}: {result['equation']}"))
        for row in result["adapters"]:
            table.add_row(escape(row["name"]), str(row["rank"]), f"{row['weight']:.3f}", escape(row["reason"]))
        console.print(table)
    for line in (*result["notes"], *(f"warning: {text}" for text in result["warnings"])):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    exact = "exactly" if merged.lost < 1e-6 else f"losing {merged.lost:.1%} of it (relative Frobenius) to the rank"
    line = f"{result['output']}: {len(result['adapters'])} adapters as one of rank {result['rank']}, {exact}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _draw(merged: Merged, rule: str, path: Path) -> None:
    """One bar an adapter: the weight it got."""
    from matplotlib.figure import Figure

    names = list(merged.weights)
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), [merged.weights[name] for name in names], color="#4477aa")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"weight in the merged adapter ({rule})")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
