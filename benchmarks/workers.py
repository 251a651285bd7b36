"""Two workers against one: seconds of a round, of the start, memory, and that both give the same digest.

    python benchmarks/workers.py             writes benchmarks/results/workers.json and prints a table
    python benchmarks/workers.py --short     one trial of less, to see that it works; writes nothing

Two jobs: 40 sites of an untrained two-layer BERT whose steps take about 10 ms, and four hospitals of the quickstart
with MiniLM. Every process computes with one thread, one site after another. One trial runs each engine once, in
turns; the ratio of two engines is taken within a trial, and its median over the trials is what counts. A round's
seconds are those of its training, the first round left out; the start is the time until the sites have joined; memory
is the sum over all processes of a run of their proportional share (PSS), so that what they share counts once. In
process with a thread a core is there to see what workers win over the threads of one process: other threads, other
bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from overhead import RESULTS, tiny_config, tiny_data, tiny_model

from fedgraft.core.config import RunConfig
from fedgraft.core.progress import Watch
from fedgraft.simulations.choice import cores
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import load_scenario

ENGINES = {
    "inprocess": Execution("inprocess", threads=1, cohort=1),
    "inprocess, a thread a core": Execution("inprocess", threads=cores(), cohort=1),
    "workers 1": Execution("workers", workers=1, threads=1, cohort=1),
    "workers 2": Execution("workers", workers=2, threads=1, cohort=1),
}


class Clock(Watch):
    """Times a run from outside, and weighs it as its last evaluation begins."""

    def __init__(self, rounds: int) -> None:
        self.began = time.perf_counter()
        self.rounds = rounds
        self.start = 0.0
        self.seconds: list[float] = []
        self.pss = 0.0

    def run_started(self, **more: Any) -> None:
        self.start = time.perf_counter() - self.began

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        if (kind, round) == ("evaluate", self.rounds):
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.pss = sum(process.memory_full_info().pss for process in family) / 2**20

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train" and record["round"] > 1:
            self.seconds.append(record["seconds"])


def trial(config: RunConfig, execution: Execution, folder: Path) -> dict[str, Any]:
    clock = Clock(config.rounds)
    run = simulate(config, folder, execution=execution, watch=clock)
    return {
        "start": clock.start,
        "round": statistics.median(clock.seconds),
        "wall": time.perf_counter() - clock.began,
        "pss": clock.pss,
        "digest": run["digest"],
    }


def job(name: str, config: RunConfig, trials: int) -> dict[str, Any]:
    """The medians of each engine, and the ratios of rounds against one worker."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for number in range(trials):
        for engine, execution in ENGINES.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[engine].append(trial(config, execution, Path(scratch) / "run"))
            print(f"{name}, trial {number + 1}, {engine}: {found[engine][-1]['round']:.2f} s a round", flush=True)
    same = {each["digest"] for engine, runs in found.items() if "a core" not in engine for each in runs}
    ratios = [one["round"] / two["round"] for one, two in zip(found["workers 1"], found["workers 2"], strict=True)]
    return {
        "job": name,
        "sites": len(config.site_names),
        "rounds": config.rounds,
        "trials": trials,
        "same_digest": len(same) == 1,
        "speedup_two_workers": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "engines": {
            engine: {
                "round_seconds": round(statistics.median(each["round"] for each in runs), 3),
                "start_seconds": round(statistics.median(each["start"] for each in runs), 2),
                "wall_seconds": round(statistics.median(each["wall"] for each in runs), 2),
                "pss_mib": round(statistics.median(each["pss"] for each in runs)),
            }
            for engine, runs in found.items()
        },
    }


def hospitals(rounds: int, batch: int) -> RunConfig:
    """The quickstart without privacy, whose noise would differ from run to run."""
    steps = ["privacy.enabled=false", "train.local_steps=2", f"train.batch_size={batch}", "evaluate.every=0"]
    return load_scenario("hospitals-icd10", [f"rounds={rounds}", *steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="one trial of less")
    parser.add_argument("--no-quickstart", action="store_true", help="leave out MiniLM")
    arguments = parser.parse_args()
    trials, rounds = (1, 2) if arguments.short else (arguments.trials, 4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", 64)
        tiny_data(folder / "data.csv", 4000)
        jobs = [job("tiny BERT", tiny_config(folder, 40, rounds=rounds), trials)]
        if not arguments.no_quickstart:
            jobs.append(job("MiniLM quickstart", hospitals(rounds, 32 if arguments.short else 64), trials))
    machine = {"processor": platform.processor() or platform.machine(), "cores": cores(), "torch": torch.__version__}
    results = {"machine": {**machine, "threads": 1}, "jobs": jobs}
    print(json.dumps(results, indent=2))
    if not all(found["same_digest"] for found in jobs):
        raise SystemExit("the engines gave different digests")
    if not arguments.short:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "workers.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
