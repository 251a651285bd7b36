"""What the in-process engine costs beside the arithmetic: seconds of a run against a bare PyTorch loop of its steps.

    python benchmarks/overhead.py                    all cases, about ten minutes
    python benchmarks/overhead.py --only tiny        those whose name begins so

The bare loop takes the same number of steps on batches of the same sizes with the same model: forward, backward,
optimizer, nothing else. With privacy it also draws the batch by Poisson sampling, clips each example's gradient with
the same engine (attached once), adds the noise and nothing else: no accounting, no ledger. The engine's seconds are
those that the run gives to its training rounds: instruction, policy, ledger, training, gate, audit log, wire and
aggregation, one site after another. Both are timed in one process, in turns; the medians count. Memory by the number
of sites: scale.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedgraft.client.data import SiteData
from fedgraft.client.resident import Resident, resident
from fedgraft.client.trainer import Sampler, by_length, by_unit
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.tasks import Example
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import shuffled_batches
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import complete, load_scenario, site_data

WORDS = [f"w{number}" for number in range(200)]
RESULTS = Path(__file__).parent / "results"
#: Of the tiny cases, of 16 tokens a text: the width of the BERT and the texts of a step that take about so many
#: milliseconds on one core of the machine that the results name.
TINY = {"10 ms": (192, 12), "3 ms": (64, 8)}


def tiny_model(folder: Path, hidden: int) -> None:
    """An untrained BERT of two layers."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
    )
    BertModel(config).save_pretrained(folder)


def tiny_data(path: Path, records: int) -> None:
    rng = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(records):
            writer.writerow([" ".join(rng.choices(WORDS, k=16)), rng.choice("abcd")])


def tiny_config(folder: Path, sites: int, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "name": "overhead",
        "rounds": 3,
        "model": str(folder / "model"),
        "method": {"rank": 4},
        "task": {"labels": list("abcd"), "max_length": 16},
        "train": {"local_steps": 10, "batch_size": 8, "lr": 0.01},
        "privacy": {"enabled": False},
        "evaluate": {"every": 0},
        "data": {"path": str(folder / "data.csv"), "sites": [f"s{i:04d}" for i in range(sites)], "partition": "iid"},
    }
    return complete(parse_config({**values, **changes}))


def quickstart_config(private: bool) -> RunConfig:
    """The quickstart, shortened."""
    changes = ["rounds=1", "train.local_steps=4", "evaluate.every=0"]
    return load_scenario("hospitals-icd10", changes if private else [*changes, "privacy.enabled=false"])


@dataclass(frozen=True)
class Site:
    """What a bare loop needs of a site; ``plan``: of its noise, which is worked out before the clock runs."""

    examples: list[Example]
    groups: list
    keys: list[bytes]
    plan: PrivacyPlan | None


def bare_sites(config: RunConfig, model: Resident) -> dict[str, Site]:
    def one(data: SiteData) -> Site:
        private = config.privacy.enabled
        labels = None if data.train.labels is None else data.train.labels.tolist()
        groups, keys = data.train.units(by_patient=private and config.privacy.unit == "patient")
        plan = PrivacyPlan.for_run(config, len(groups), config.total_steps) if private else None
        return Site(model.task.encode(data.train.inputs, labels, model.base.processor), groups, keys, plan)

    return {name: one(data) for name, data in site_data(config).items()}


def bare_loop(config: RunConfig) -> Callable[[], float]:
    """What takes the steps of all rounds and sites, and gives its seconds."""
    model = resident(config)
    adapter, task, settings = model.adapter, model.task, config.train
    sites = bare_sites(config, model)
    start = adapter.read()

    def visits(parameters: list[torch.nn.Parameter]) -> Iterator[tuple[Site, RandomStream, torch.optim.Optimizer]]:
        for number in range(1, config.rounds + 1):
            for name in config.site_names:
                optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)
                yield sites[name], RandomStream.seeded_not_private(config.seed, name, number), optimizer

    def plain(parameters: list[torch.nn.Parameter]) -> None:
        for site, stream, optimizer in visits(parameters):
            batches = shuffled_batches(len(site.examples), settings.batch_size, stream)
            for _ in range(settings.local_steps):
                chosen = next(batches)
                optimizer.zero_grad(set_to_none=True)
                for micro in by_length(site.examples, chosen, settings.micro_batch):
                    batch = task.collate(micro, model.base.processor)
                    (task.losses(adapter.model, batch).sum() / len(chosen)).backward()
                optimizer.step()

    def private(parameters: list[torch.nn.Parameter]) -> None:
        clip = config.privacy.clip
        with create_engine(config.privacy.engine, adapter.model, adapter.trainables(), clip) as gradients:
            for site, stream, optimizer in visits(parameters):
                plan = site.plan
                sampler = Sampler(plan, site.groups, site.keys, stream)
                for step in range(settings.local_steps):
                    sample = sampler.sample(step)
                    for micro, _ in by_unit(site.examples, sample, settings.micro_batch):
                        batch = task.collate(micro, model.base.processor)
                        gradients.expect(len(micro))
                        gradients.add(task.losses(adapter.model, batch))
                    gradients.release(plan.gradient_noise, plan.expected_batch, plan.noise_for(stream, step))
                    optimizer.step()

    def run() -> float:
        adapter.adopt(start.spec)
        adapter.write(start)
        parameters = list(adapter.trainables().values())
        began = time.perf_counter()
        (private if config.privacy.enabled else plain)(parameters)
        return time.perf_counter() - began

    return run


def engine(config: RunConfig, folder: Path) -> float:
    """Seconds that the run's own metrics give to its training rounds."""
    run = simulate(config, folder, execution=Execution(cohort=1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines if line["kind"] == "train")
    if run["rounds"] != config.rounds:
        raise RuntimeError("the run did not finish")
    return seconds


def overhead(name: str, config: RunConfig, repeats: int) -> dict[str, object]:
    visits = config.rounds * len(config.site_names)
    ratios, bare, ours = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        loop = bare_loop(config)
        loop()
        engine(config, Path(scratch) / "warm-up")
        for number in range(repeats):
            # In turns, and each of the two first as often as second.
            if number % 2:
                e, b = engine(config, Path(scratch) / str(number)), loop()
            else:
                b, e = loop(), engine(config, Path(scratch) / str(number))
            bare.append(b / visits)
            ours.append(e / visits)
            ratios.append(e / b)
    steps = config.train.local_steps
    return {
        "case": name,
        "sites": len(config.site_names),
        "rounds": config.rounds,
        "steps_per_site_and_round": steps,
        "batch": config.train.batch_size,
        "bare_milliseconds_per_step": round(1000 * statistics.median(bare) / steps, 2),
        "bare_seconds_per_site_and_round": round(statistics.median(bare), 4),
        "engine_seconds_per_site_and_round": round(statistics.median(ours), 4),
        "extra_milliseconds_per_site_and_round": round(1000 * (statistics.median(ours) - statistics.median(bare)), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "repeats": repeats,
    }


def cases(folder: Path) -> Iterator[tuple[str, RunConfig, int]]:
    """Every case with how often it is repeated."""
    tiny_data(folder / "data.csv", 4000)
    for title, (hidden, batch) in TINY.items():
        tiny_model(folder / title / "model", hidden)
        (folder / title / "data.csv").symlink_to(folder / "data.csv")
        for private in (False, True):
            config = tiny_config(
                folder / title,
                10,
                train={"local_steps": 10, "batch_size": batch, "lr": 0.01},
                privacy={"enabled": private, "epsilon": 8.0, "delta": 1e-4},
            )
            yield f"tiny BERT, steps of {title}{', private' if private else ''}", config, 9
    yield "MiniLM quickstart", quickstart_config(False), 3
    yield "MiniLM quickstart, private", quickstart_config(True), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose names begin so; nothing is written then")
    parser.add_argument("--repeats", type=int, default=0, help="0: as many as each case has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, config, repeats in cases(Path(scratch)):
            if name.startswith(arguments.only):
                rows.append(overhead(name, config, arguments.repeats or repeats))
                print(json.dumps(rows[-1]), flush=True)
    if not arguments.only:
        machine = {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
        results = {"what": __doc__.splitlines()[0], "machine": machine, "overhead": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "overhead.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
