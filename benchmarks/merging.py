"""Mergers on ICD-10: one adapter a hospital, and a new hospital with five labelled phrases a chapter, or none.

    python benchmarks/merging.py [--steps N] [--cache FOLDER] [--only HOSPITAL ...]

Writes benchmarks/results/merging.json and docs/images/merging.svg, and prints a table. Six hospitals of the scenario
`hospitals-icd10`, whose specialties skew their chapters (Dirichlet 0.5), each train one LoRA adapter on their own
phrases, from one initial seed, without privacy. Then each in turn is the new hospital: the other five adapters are
merged, and the result is scored on the new hospital's held-out phrases, whose categories nobody trained on. Seconds are
of the processor, with what a rule asks of the few phrases or of the other hospitals' records. Adapters and finished
hospitals are kept in the cache, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.stats import t as student

from fedgraft.client.composing.embeddings import embed, noised_mean, profile_event
from fedgraft.client.composing.scoring import Scorer, encode, resident_for
from fedgraft.client.composing.statistics import fisher, grams
from fedgraft.client.data import Records, SiteData
from fedgraft.client.resident import Resident, resident
from fedgraft.client.trainer import by_length, train
from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import PrivacyConfig, RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task
from fedgraft.methods.arrow import route
from fedgraft.privacy.noise import RandomStream
from fedgraft.simulations.scenario import load_scenario, site_data
from fedgraft.strategies.merging import Adapter, Context, create_merger
from fedgraft.strategies.merging.mixing import common_spec

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "merging.json"
PICTURE = HERE.parent / "docs" / "images" / "merging.svg"
HOSPITALS = ("ash", "birch", "cedar", "elm", "fir", "oak")
SHOTS, TEXTS, EPSILON, STATISTICS, FEW_STEPS = 5, 100, 1.0, 60, 40
SETTINGS = [
    f"data.sites={json.dumps(HOSPITALS)}",
    "rounds=1",
    "privacy.enabled=false",
    "train.optimizer=adamw",
    "train.lr=2e-3",
    "train.batch_size=32",
    "data.test_per_class=60",
    "train.device=cpu",
]

#: What a row of the table needs of the new hospital (or of the others).
NEEDS = {
    "nothing": "#4C78A8",
    "unlabelled phrases": "#72B7B2",
    "5 labelled a chapter": "#F58518",
    "statistics of the others' records": "#B279A2",
    "for comparison": "#9D9D9D",
}


@dataclass(frozen=True)
class Hospital:
    """One hospital: its data, its adapter, and what others need to know of its texts."""

    name: str
    data: SiteData
    state: AdapterState
    folder: Path
    vectors: np.ndarray
    private: np.ndarray
    noise: float


@dataclass(frozen=True)
class Row:
    """One line of the table for one new hospital."""

    rule: str
    needs: str
    accuracy: float
    seconds: float
    lost: float = 0.0
    weights: dict[str, float] | None = None


def trained(
    config: RunConfig, model: Resident, start: AdapterState, records: Records, name: str, steps: int
) -> AdapterState:
    settings = config.train.model_copy(update={"local_steps": steps})
    examples = encode(model, records)
    run = config.model_copy(update={"train": settings})
    return train(model, start, examples, [], run, site=name, round=1, plan=None).state


def few(records: Records, shots: int, seed: int) -> Records:
    """At most ``shots`` records of each chapter that the hospital has."""
    order = np.random.default_rng([seed, 5]).permutation(len(records))
    labels = np.asarray(records.labels)[order]
    chosen = [order[np.flatnonzero(labels == label)[:shots]] for label in np.unique(labels)]
    return records.take(np.sort(np.concatenate(chosen)))


def hospitals(config: RunConfig, steps: int, cache: Path) -> tuple[AdapterState, list[Hospital], dict[str, float]]:
    """The common start, the hospitals, and the seconds that each one's training took."""
    model = resident(config)
    initial = model.adapter.read()
    found, seconds = [], {}
    for name, data in site_data(config).items():
        kept = cache / f"{name}.safetensors"
        told = cache / f"{name}.json"
        if not kept.is_file() or not told.is_file():
            began = time.process_time()
            state = trained(config, model, initial, data.train, name, steps)
            state.save(kept)
            told.write_text(json.dumps(time.process_time() - began))
            print(f"{name}: {len(data.train)} phrases, trained in {json.loads(told.read_text()):.0f} s", flush=True)
        seconds[name] = json.loads(told.read_text())
        vectors = cached(
            cache / f"{name}-vectors.npy", lambda data=data: embed(model, encode(model, data.train), config)
        )
        # Every patient of the hospital pays: epsilon 1 for this one release.
        groups, _ = data.train.units(by_patient=True)
        event = profile_event(len(groups), PrivacyConfig(epsilon=EPSILON, delta=1e-4))
        stream = RandomStream.seeded_not_private("merging", config.seed, name)
        private = noised_mean(vectors, groups, event, stream)[None]
        noise = event.noise_multiplier / len(groups)
        state = AdapterState.load(kept)
        folder = model.adapter.save_peft(cache / name, state)
        found.append(Hospital(name, data, state, folder, vectors, private, noise))
    return initial, found, seconds


def cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not path.is_file():
        np.save(path, make())
    return np.load(path)


def some(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.random.default_rng(6).permutation(len(rows))[:count]]


PARTS = ("without_data", "with_texts", "with_labels", "with_fusion", "with_statistics", "for_comparison")


class Newcomer:
    """Everything that is tried for one new hospital."""

    def __init__(self, config: RunConfig, initial: AdapterState, new: Hospital, others: Sequence[Hospital]) -> None:
        self.config, self.initial, self.new = config, initial, new
        self.others = list(others)
        self.adapters = [Adapter(hospital.name, hospital.state) for hospital in others]
        self.few = few(new.data.train, SHOTS, config.seed)
        self.test, self.few_scorer = Scorer(config, new.data.held_out), Scorer(config, self.few)
        self.rows: list[Row] = []
        self.exact = sum(hospital.state.spec.rank or 0 for hospital in others)

    def tell(self, rule: str, needs: str, state: AdapterState, seconds: float, **more: Any) -> None:
        self.rows.append(Row(rule, needs, self.test.accuracy(state), seconds, **more))
        print(f"  {rule:34s} {self.rows[-1].accuracy:.3f}  {seconds:6.2f} s", flush=True)

    def merge(self, label: str, needs: str, rule: str, *, rank: int = 0, spent: float = 0.0, **given: Any) -> None:
        options = given.pop("options", {})
        began = time.process_time()
        spec = common_spec(self.adapters, rank or self.exact)
        merged = create_merger(rule, options).merge(self.adapters, Context(spec=spec, seed=self.config.seed, **given))
        seconds = time.process_time() - began + spent
        weights = {name: round(weight, 4) for name, weight in merged.weights.items()}
        self.tell(label, needs, merged.state, seconds, lost=merged.lost, weights=weights)

    def run(self, part: str) -> list[Row]:
        """The rows of one of :data:`PARTS`."""
        resident_for(self.config, common_spec(self.adapters, self.exact))  # loaded before a clock runs
        getattr(self, part)()
        return self.rows

    def without_data(self) -> None:
        own = self.initial.spec.rank or 0
        self.merge("uniform soup", "nothing", "uniform")
        self.merge("uniform soup, rank kept", "nothing", "uniform", rank=own)
        self.merge("task arithmetic, lambda 0.4", "nothing", "task-arithmetic")
        self.merge("ties", "nothing", "ties")
        self.merge("dare", "nothing", "dare")
        self.merge("knots", "nothing", "knots")
        self.merge("mera", "nothing", "mera", rank=own)
        base = create_task(self.config.task).load(self.config.model, self.config.task, self.config.seed)
        began = time.process_time()
        model = route(base, [adapter.state for adapter in self.adapters])
        seconds = time.process_time() - began
        self.rows.append(Row("arrow", "nothing", self.accuracy_of(model, base), seconds))
        print(f"  {'arrow':34s} {self.rows[-1].accuracy:.3f}  {seconds:6.2f} s", flush=True)

    def accuracy_of(self, model: Any, base: Any) -> float:
        task = create_task(self.config.task)
        records = self.new.data.held_out
        examples = task.encode(records.inputs, np.asarray(records.labels).tolist(), base.processor)
        right = 0.0
        with torch.inference_mode():
            for batch in by_length(examples, range(len(examples)), self.config.evaluate.batch_size):
                right += float(task.counts(model, task.collate(batch, base.processor))["correct"].sum())
        return right / len(examples)

    def with_texts(self) -> None:
        needs = "unlabelled phrases"
        texts = some(self.new.vectors, TEXTS)
        raw = {hospital.name: some(hospital.vectors, TEXTS) for hospital in self.others}
        private = {hospital.name: hospital.private for hospital in self.others}
        noise = {hospital.name: hospital.noise for hospital in self.others}
        nearest = {"most": 2, "threshold": -1.0}
        try:
            self.merge("adaptersoup, cosine > 0.15", needs, "adaptersoup", embeddings=raw, texts=texts)
        except UserError as error:
            print(f"  {error}", flush=True)
        self.merge("adaptersoup, 2 most similar", needs, "adaptersoup", embeddings=raw, texts=texts, options=nearest)
        self.merge(
            f"adaptersoup, 2 most similar, DP {EPSILON:g}",
            needs,
            "adaptersoup",
            embeddings=private,
            noise=noise,
            texts=texts,
            options=nearest,
        )
        grouped = {"select": "clustering"}
        self.merge("adaptersoup, clusters", needs, "adaptersoup", embeddings=raw, texts=texts, options=grouped)
        self.merge(
            f"adaptersoup, clusters, DP {EPSILON:g}",
            needs,
            "adaptersoup",
            embeddings=private,
            noise=noise,
            texts=texts,
            options=grouped,
        )

    def with_labels(self) -> None:
        needs, scorer = "5 labelled a chapter", self.few_scorer
        given = {"score": scorer.accuracy, "loss": scorer.loss, "labels": scorer.labels}
        self.merge("greedy soup", needs, "greedy", **given)
        self.merge("task arithmetic, lambda chosen", needs, "task-arithmetic", **given)
        own = self.initial.spec.rank or 0
        self.merge("lorahub", needs, "lorahub", rank=own, **given)
        self.merge("lorahub on products", needs, "lorahub", options={"compose": "products"}, **given)
        began = time.process_time()
        single = max(self.adapters, key=lambda adapter: scorer.accuracy(adapter.state))
        self.tell("best single by the few", needs, single.state, time.process_time() - began)
        began = time.process_time()
        model = resident_for(self.config, self.initial.spec)
        state = trained(self.config, model, self.initial, self.few, f"few-{self.new.name}", FEW_STEPS)
        self.tell("trained on the few alone", needs, state, time.process_time() - began)

    def with_fusion(self) -> None:
        """Attention over the five adapters, trained on the few as the lone adapter is."""
        folders = tuple(str(hospital.folder) for hospital in self.others)
        method = self.config.method.model_copy(update={"name": "adapterfusion", "experts": folders})
        config = self.config.model_copy(update={"method": method})
        model = resident(config)
        scorer, start = Scorer(config, self.new.data.held_out), model.adapter.read()
        began = time.process_time()
        state = trained(config, model, start, self.few, f"few-{self.new.name}", FEW_STEPS)
        seconds = time.process_time() - began
        for label, held, spent in (("mean of outputs, mean head", start, 0.0), ("adapterfusion", state, seconds)):
            needs = "nothing" if held is start else "5 labelled a chapter"
            self.rows.append(Row(label, needs, scorer.accuracy(held), spent))
            print(f"  {label:34s} {self.rows[-1].accuracy:.3f}  {spent:6.2f} s", flush=True)

    def with_statistics(self) -> None:
        needs, own = "statistics of the others' records", self.initial.spec.rank or 0
        model = resident_for(self.config, self.initial.spec)
        found: dict[str, dict[str, Any]] = {"fisher": {}, "grams": {}}
        spent = dict.fromkeys(found, 0.0)
        for hospital in self.others:
            rows = np.random.default_rng(7).permutation(len(hospital.data.train))[:STATISTICS]
            examples = encode(model, hospital.data.train.take(rows))
            for key, statistic in (("fisher", fisher), ("grams", grams)):
                began = time.process_time()
                found[key][hospital.name] = statistic(model, hospital.state, examples, self.config)
                spent[key] += time.process_time() - began
        self.merge("fisher", needs, "fisher", rank=own, spent=spent["fisher"], fisher=found["fisher"])
        self.merge("regmean", needs, "regmean", spent=spent["grams"], grams=found["grams"])

    def for_comparison(self) -> None:
        needs = "for comparison"
        self.tell("untrained", needs, self.initial, 0.0)
        singles = [self.test.accuracy(adapter.state) for adapter in self.adapters]
        for label, value in (
            ("a single adapter, on average", statistics.mean(singles)),
            ("oracle single", max(singles)),
        ):
            self.rows.append(Row(label, needs, value, 0.0))
            print(f"  {label:34s} {value:.3f}", flush=True)
        self.tell("trained on all its own phrases", needs, self.new.state, 0.0)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy over the new hospitals, with a 95 % interval (Student), best first within what is needed."""
    found = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        values = [row["accuracy"] for row in own]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        half = float(student.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values)) if len(values) > 1 else 0.0
        found.append(
            {
                "rule": rule,
                "needs": own[0]["needs"],
                "accuracy": round(statistics.mean(values), 4),
                "interval": round(half, 4),
                "seconds": round(statistics.mean(row["seconds"] for row in own), 2),
                "lost": round(statistics.mean(row["lost"] for row in own), 4),
            }
        )
    order = list(NEEDS)
    return sorted(found, key=lambda entry: (order.index(entry["needs"]), -entry["accuracy"]))


def draw(entries: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], target: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "fedgraft", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(8.5, 0.3 * len(entries) + 1.6))
    for at, entry in enumerate(reversed(entries)):
        colour = NEEDS[entry["needs"]]
        axes.barh(at, entry["accuracy"], color=colour, height=0.72, alpha=0.85)
        points = [row["accuracy"] for row in rows if row["rule"] == entry["rule"]]
        axes.plot(points, [at] * len(points), "o", color="black", markersize=2.5, alpha=0.6)
        axes.text(entry["accuracy"] + 0.004, at + 0.12, f"{entry['accuracy']:.2f}", fontsize=7, va="bottom")
    axes.set_yticks(range(len(entries)), [entry["rule"] for entry in reversed(entries)], fontsize=8)
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.set_xlabel("accuracy on the new hospital's phrases (bar: mean of six hospitals, dots: each)")
    axes.legend(
        [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in NEEDS.values()],
        [f"needs {need}" if need != "for comparison" else need for need in NEEDS],
        fontsize=7,
        loc="lower right",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("22 ICD-10 chapters, LoRA r = 4 on MiniLM: five adapters merged for a sixth hospital", fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each hospital's training")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedgraft-merging")
    parser.add_argument("--only", choices=HOSPITALS, action="append", help="new hospitals to try (default: each)")
    parser.add_argument("--set", action="append", default=[], help="another setting, key=value")
    arguments = parser.parse_args()
    config = load_scenario("hospitals-icd10", [*SETTINGS, *arguments.set])
    chosen = json.dumps([SETTINGS, arguments.set, arguments.steps])
    cache = arguments.cache / hashlib.sha256(chosen.encode()).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    initial, found, seconds = hospitals(config, arguments.steps, cache)
    every: list[dict[str, Any]] = []
    for new in found:
        if arguments.only and new.name not in arguments.only:
            continue
        others = [hospital for hospital in found if hospital is not new]
        print(f"new hospital {new.name}: {len(new.data.held_out)} held-out phrases", flush=True)
        for part in PARTS:
            kept = cache / f"{new.name}-{part}.json"
            if not kept.is_file():
                rows = Newcomer(config, initial, new, others).run(part)
                kept.write_text(json.dumps([{**vars(row), "hospital": new.name} for row in rows]))
            every += json.loads(kept.read_text())
    entries = summary(every)
    for entry in entries:
        print(
            f"{entry['rule']:34s} {entry['accuracy']:.3f} +- {entry['interval']:.3f}  {entry['seconds']:7.2f} s  "
            f"lost {entry['lost']:.3f}  {entry['needs']}"
        )
    results = {
        "conditions": {
            "model": config.model,
            "rank": config.method.rank,
            "steps": arguments.steps,
            "shots": SHOTS,
            "steps on the few": FEW_STEPS,
            "texts": TEXTS,
            "records for statistics": STATISTICS,
            "embedding epsilon": EPSILON,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "hospitals": {
            hospital.name: {
                "phrases": len(hospital.data.train),
                "held out": len(hospital.data.held_out),
                "seconds of training": round(seconds[hospital.name], 1),
            }
            for hospital in found
        },
        "summary": entries,
        "rows": every,
    }
    if not arguments.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draw(entries, every, PICTURE)


if __name__ == "__main__":
    main()
