"""Write docs/methods.md from the catalogue itself: every method, what it trains, and the counts that papers publish.

python docs/methods.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, RobertaConfig, T5Config

from fedgraft.core.config import MethodConfig
from fedgraft.methods import Method, methods
from fedgraft.server.method_card import count, count_of
from fedgraft.server.traffic import Skeleton, skeleton_of

_PAGE = """# Methods

{count} methods train; `fedgraft methods` lists them, `fedgraft methods show NAME` says all of one, and
`fedgraft methods --model M` counts what each trains on a model of yours. Every one of them keeps the contract of
`fedgraft.simulations.contract` on each family that it fits: it trains, nothing else moves, what is sent is all that a
receiver needs, averaging does what is said here, folders come back (also by PEFT itself), merged it computes the same,
and its clipped sum is that of single records (`pytest tests/methods/test_contract.py`). To add one, see
[Writing a method](writing-a-method.md). This page is written by `python docs/methods.py`.

Trains: numbers beside the task's head on RoBERTa-base, with the defaults. A family with * fits in some tasks only.

{catalogue}

{refusals}## Choosing

`fedgraft methods advise --model M --sites 4 --epsilon 8 --uplink 5 --memory 8` ranks them for a model and a federation:
what each sends, how long that takes, the memory of a site, the noise of a step beside its signal, and the accuracy to
expect, which is what was measured here, less what the noise takes at that budget.

{measured}

## Published counts

Millions of trainable numbers in {survey}, and ours on models made of their
configurations. head: whether the task's head (two classes) is in the count.

{published}
"""
_MEASURED = """`python benchmarks/methods.py`: the quickstart's four hospitals, MiniLM, 22 classes, two rounds
of six steps of 48 patients: how far a method comes in a short training, not where it ends. The best of three
learning rates, the same for all but those that move whole weights (`diff-pruning` at epsilon 8 had the one that
was best without: three take over half an hour); for {ends} of {all} it was at an end of the three, where
another might do better. Accuracy in % on 630 phrases (one standard error is about 2; 16 methods measured twice
at epsilon 8, each time with noise of its own, differed by 3.5, root mean square), seconds of a site's step, and
the most memory that the process held
({conditions}).
`adapterfusion`, `attempt` and `spot` begin with adapters that other federations trained on the same records,
without privacy: their figures at epsilon 8 are of the step that they take alone, and neither the picture nor
`advise` goes by them. Masks are made of 220 phrases that count as public.

![Accuracy against bytes for the methods that were measured, without privacy and at epsilon 8](images/methods.svg)"""
FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "methods.json"
SURVEY = "Xu et al. 2023, arXiv 2312.12148, table III"
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_POSITIONS = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
#: The models of the survey's table.
MODELS: dict[str, Any] = {
    "RoBERTa-base": lambda: RobertaConfig(**_POSITIONS),
    "RoBERTa-large": lambda: RobertaConfig(**_POSITIONS, **_LARGE),
    "T5-base": lambda: T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "LLaMA-7B": lambda: LlamaConfig(),
}


@dataclass(frozen=True)
class Published:
    """What a paper counts, in millions; ``head``: whether the task's head is in it; ``why``: where we differ."""

    method: str
    model: str
    millions: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: bool = True
    why: str = ""


_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EVERY: dict[str, Any] = {"target_modules": _LINEARS}
_MIXED: dict[str, Any] = {"virtual_tokens": 30, "options": {"width": 30}}
_NETWORKS = (
    "ours trains the prefix as it is. The paper's count agrees with adapters of width 30 (0.56 M; large 1.50 M) and "
    "three networks of width 800 that make prefixes of 30 tokens (46.21 M; 120.66 M), as its code holds them though an "
    "encoder uses one"
)
_MASKS = "the count agrees with the masks alone; ours has the common factors too, which train and are exchanged as well"
PUBLISHED = (
    Published("full", "RoBERTa-base", 124.6),
    Published("full", "RoBERTa-large", 355.3),
    Published("houlsby", "RoBERTa-base", 7.41, {"options": {"width": 200}}, head=False),
    Published("houlsby", "RoBERTa-large", 19.77, {"options": {"width": 200}}, head=False),
    Published("prompt", "RoBERTa-base", 0.61, {"virtual_tokens": 20}),
    Published("prompt", "RoBERTa-large", 1.07, {"virtual_tokens": 20}),
    Published("prefix", "RoBERTa-base", 0.96, {"virtual_tokens": 20}),
    Published("prefix", "RoBERTa-large", 2.03, {"virtual_tokens": 20}),
    Published("ia3", "RoBERTa-base", 0.66),
    Published("ia3", "RoBERTa-large", 1.22),
    Published("bitfit", "RoBERTa-base", 0.69),
    Published("bitfit", "RoBERTa-large", 1.32),
    Published("propetl", "RoBERTa-base", 1.87, {"options": {"width": 64}}),
    Published("propetl", "RoBERTa-large", 5.40, {"options": {"width": 85}}),
    Published("propetl-lora", "RoBERTa-base", 1.77, {"rank": 32}, why=_MASKS),
    Published("propetl-lora", "RoBERTa-large", 4.19, {"rank": 32}, why=_MASKS),
    Published("lora", "RoBERTa-base", 0.89, {"rank": 8}),
    Published("lora", "RoBERTa-large", 1.84, {"rank": 8}),
    Published("adalora", "RoBERTa-base", 1.03, {"rank": 8}),
    Published("adalora", "RoBERTa-large", 2.23, {"rank": 8}),
    Published("mam", "RoBERTa-base", 46.78, _MIXED, head=False, why=_NETWORKS),
    Published("mam", "RoBERTa-large", 122.2, _MIXED, head=False, why=_NETWORKS),
    Published("lora", "T5-base", 0.88, {"rank": 8}, head=False),
    Published(
        "ia3",
        "T5-base",
        0.07,
        head=False,
        why="0.074 M are the vectors of the feed-forward blocks alone; ours has those of keys and values too, as the "
        "paper of (IA)3 does",
    ),
    Published("lora", "LLaMA-7B", 159.9, {"rank": 64, **_EVERY}, head=False),
    Published("ia3", "LLaMA-7B", 1.58, _EVERY, head=False),
)


def counted(entry: Published, models: Mapping[str, Skeleton]) -> float:
    """Our count of ``entry``, in millions."""
    settings = {"alpha": 16.0, **entry.settings}
    found = count_of(models[entry.model].attach(MethodConfig(name=entry.method, **settings)).spec)
    return (found.trained if entry.head else found.adapter) / 1e6


def skeletons() -> dict[str, Skeleton]:
    """The models of the survey's table, from their configurations, without memory."""
    return {name: skeleton_of(make(), name) for name, make in MODELS.items()}


def _fits(method: Method) -> str:
    unfit = method.contract.get("unfit", {})
    marks = []
    for family in FAMILIES:
        partly = any(key.startswith(f"{family}/") for key in unfit)
        marks.append("" if family in unfit else f"{family}*" if partly else family)
    return " ".join(mark for mark in marks if mark)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _trained(method: Method, on: Skeleton) -> str:
    if method.refused:
        return ""
    found = count(method, on)
    if found.refused:
        if "roberta" in method.contract.get("unfit", {}):
            return "another family"
        if {"mask", "experts"} & method.accepts:
            return "needs a file"
        return "needs an option" if "method.options" in found.refused else "needs the weights"
    return f"{found.adapter:,}"


def _table(head: str, rows: Iterable[Sequence[object]]) -> str:
    columns = head.split(" | ")
    lines = [f"| {head} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def catalogue(known: Sequence[Method], base: Skeleton) -> str:
    """The methods that train, a row each."""
    return _table(
        "method | equation | trains | averaging | fits | merges | source",
        (
            (
                f"`{method.name}`",
                _cell(method.equation or method.summary),
                _trained(method, base),
                _cell(method.federates),
                _fits(method),
                "yes" if method.merges else "no",
                method.source,
            )
            for method in known
            if not method.refused
        ),
    )


def refusals(known: Sequence[Method]) -> str:
    """What is refused, at all or with privacy, and why."""
    rows = [
        (f"`{method.name}`", _cell(method.refused or f"with privacy: {method.dp.removeprefix('refused: ')}"))
        for method in known
        if method.refused or method.dp != "exact"
    ]
    return f"Refused, or refused with privacy:\n\n{_table('method | why', rows)}\n\n" if rows else ""


def published(models: Mapping[str, Skeleton]) -> str:
    """What papers count beside what is counted here, and a note where they differ."""
    rows, notes = [], []
    for entry in PUBLISHED:
        ours = counted(entry, models)
        settings = (f"{key} = {'all linear' if value is _LINEARS else value}" for key, value in entry.settings.items())
        off = f"{100 * (ours / entry.millions - 1):+.1f} %"
        if entry.why:
            notes.append(f"({len(notes) + 1}) {entry.method} on {entry.model}: {entry.why}.")
            off += f" ({len(notes)})"
        head = "yes" if entry.head else "no"
        rows.append((f"`{entry.method}`", entry.model, ", ".join(settings), head, entry.millions, f"{ours:.3f}", off))
    table = _table("method | model | settings | head | published | ours | off by", rows)
    notes.append("ProPETL's count over prefixes (10.49 M; large 26.85 M) has no counterpart here.")
    return "\n\n".join((table, *notes))


def measured() -> str:
    """What `benchmarks/methods.py` found, the best without privacy first."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    for name, modes in kept["table"].items():
        good = [entry for entry in modes.values() if "accuracy" in entry]
        if not good:
            continue
        cells = [f"`{name}`", f"{100 * good[0]['trainable'] / good[0]['parameters']:.2f}"]
        cells.append(f"{good[0]['bytes_up_round'] / 1000:.0f}")
        for mode in ("none", "epsilon 8"):
            entry = modes.get(mode, {})
            keys = ("accuracy", "seconds_a_step", "peak_mib") if "accuracy" in entry else ()
            cells += [f"{100 * entry[k]:.1f}" if k == "accuracy" else str(entry[k]) for k in keys] or ["", "", ""]
        rows.append(cells)
    rows.sort(key=lambda cells: -float(cells[3] or 0))
    head = "method | trains, % | kB up a round | accuracy | s a step | MiB | at epsilon 8 | s a step | MiB"
    done = [entry for modes in kept["table"].values() for entry in modes.values() if "accuracy" in entry]
    tried = [(entry, sorted(run["lr"] for run in entry["runs"])) for entry in done if len(entry["runs"]) >= 3]
    about = _MEASURED.format(
        conditions=kept.get("conditions", ""),
        ends=sum(entry["lr"] in (rates[0], rates[-1]) for entry, rates in tried),
        all=len(tried),
    )
    # A method that fits no text says so twice.
    missing: dict[str, list[str]] = {}
    for name, modes in kept["table"].items():
        for mode, entry in modes.items():
            if "refused" in entry:
                missing.setdefault(f"`{name}`: {entry['refused']}", []).append(mode)
    without = {"none": "without privacy", "epsilon 8": "at epsilon 8"}
    notes = [f"- {what} ({' and '.join(without[mode] for mode in modes)})" for what, modes in sorted(missing.items())]
    text = f"{about}\n\n{_table(head, rows)}"
    return f"{text}\n\nNot measured:\n\n{chr(10).join(notes)}" if notes else text


def page() -> str:
    known, models = methods(), skeletons()
    return _PAGE.format(
        count=sum(not method.refused for method in known),
        catalogue=catalogue(known, models["RoBERTa-base"]),
        refusals=refusals(known),
        survey=SURVEY,
        published=published(models),
        measured=measured(),
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
