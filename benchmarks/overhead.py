"""What the in-process engine costs beside the arithmetic: seconds a client-round against a bare PyTorch loop, memory.

    python benchmarks/overhead.py            writes benchmarks/results/overhead.json and prints a table

The bare loop does the same steps on the same batches with the same model: forward, backward, optimizer, nothing else.
Both are timed in one process, interleaved, and the medians of the ratio are reported. Memory is the peak resident size
of a fresh process for each number of sites, with the same number of records in all.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedgraft.client.resident import resident
from fedgraft.client.trainer import by_length
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.sampling import shuffled_batches
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import complete, site_data

WORDS = [f"w{number}" for number in range(200)]
RESULTS = Path(__file__).parent / "results"


def tiny_model(folder: Path, hidden: int) -> None:
    """An untrained two-layer BERT; at hidden 64 a step of 8 texts takes about 10 ms on one core."""
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


def quickstart_config() -> RunConfig:
    from fedgraft.simulations.scenario import load_scenario

    return load_scenario(
        "hospitals-icd10",
        ["privacy.enabled=false", "rounds=1", "train.local_steps=4", "train.batch_size=64", "evaluate.every=0"],
    )


def bare_loop(config: RunConfig) -> float:
    """Seconds for the steps of all rounds and sites, and for nothing else."""
    model = resident(config)
    sites = site_data(config)
    adapter, task, settings = model.adapter, model.task, config.train
    encoded = {
        name: task.encode(data.train.inputs, data.train.labels.tolist(), model.base.processor)
        for name, data in sites.items()
    }
    start = adapter.read()
    adapter.adopt(start.spec)
    parameters = list(adapter.trainables().values())
    began = time.perf_counter()
    for number in range(1, config.rounds + 1):
        for name in config.site_names:
            optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)
            batches = shuffled_batches(
                len(encoded[name]),
                settings.batch_size,
                RandomStream.seeded_not_private(config.seed, name, number),
            )
            for _ in range(settings.local_steps):
                chosen = next(batches)
                optimizer.zero_grad(set_to_none=True)
                for micro in by_length(encoded[name], chosen, settings.micro_batch):
                    batch = task.collate(micro, model.base.processor)
                    (task.losses(adapter.model, batch).sum() / len(chosen)).backward()
                optimizer.step()
    elapsed = time.perf_counter() - began
    adapter.write(start)
    return elapsed


def engine(config: RunConfig, folder: Path) -> float:
    """Seconds that the run's own metrics give to its training rounds: instruction, training, wire, aggregation."""
    run = simulate(config, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines if line["kind"] == "train")
    if run["rounds"] != config.rounds:
        raise RuntimeError("the run did not finish")
    return seconds


def overhead(name: str, config: RunConfig, repeats: int) -> dict[str, object]:
    client_rounds = config.rounds * len(config.site_names)
    ratios, bare, ours = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        bare_loop(config)
        engine(config, Path(scratch) / "warm-up")
        for number in range(repeats):
            b = bare_loop(config)
            e = engine(config, Path(scratch) / str(number))
            bare.append(b / client_rounds)
            ours.append(e / client_rounds)
            ratios.append(e / b)
    return {
        "case": name,
        "sites": len(config.site_names),
        "steps_per_client_round": config.train.local_steps,
        "bare_seconds_per_client_round": round(statistics.median(bare), 4),
        "engine_seconds_per_client_round": round(statistics.median(ours), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "repeats": repeats,
    }


def memory(sites: int) -> dict[str, object]:
    """Peak resident MiB of a fresh process that simulates ``sites`` sites for one round."""
    command = [sys.executable, __file__, "--memory-of", str(sites)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def memory_of(sites: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", 64)
        tiny_data(folder / "data.csv", 4000)
        config = tiny_config(folder, sites, rounds=2)
        began = time.perf_counter()
        simulate(config, folder / "run")
        seconds = time.perf_counter() - began
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"sites": sites, "peak_mib": round(peak / 1024, 1), "seconds": round(seconds, 2)}))


def flower_wall() -> dict[str, object]:
    """Wall seconds of one tiny job on Flower's simulation runtime and in process, start to end."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", 64)
        tiny_data(folder / "data.csv", 2000)
        config = tiny_config(folder, 10)
        seconds = {}
        for name in ("inprocess", "flower"):
            began = time.perf_counter()
            simulate(config, folder / name, execution=Execution(name))  # type: ignore[arg-type]
            seconds[name] = round(time.perf_counter() - began, 1)
    return {"sites": 10, "rounds": 3, **{f"{name}_wall_seconds": value for name, value in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-quickstart", action="store_true", help="leave out MiniLM")
    parser.add_argument("--no-flower", action="store_true", help="leave out Flower's runtime")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory_of(arguments.memory_of)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", 64)
        tiny_data(folder / "data.csv", 2000)
        cases = [overhead("tiny BERT, 10 sites", tiny_config(folder, 10), arguments.repeats)]
    if not arguments.no_quickstart:
        cases.append(overhead("MiniLM quickstart", quickstart_config(), 3))
    results = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__},
        "overhead": cases,
        "memory": [memory(sites) for sites in (10, 50, 200)],
    }
    if not arguments.no_flower:
        results["flower"] = flower_wall()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
