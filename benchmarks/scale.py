"""How memory and time grow with the number of simulated sites, in one process.

    python benchmarks/scale.py                 10, 100, 1,000 and 5,000 sites, without and with privacy
    python benchmarks/scale.py --sizes 10 100  fewer of them, nothing written

Every size is a process of its own that simulates one round of the same tiny model, with an evaluation before and after:
the same 100,000 records in all, dealt evenly. Memory is the largest resident size of the process (VmHWM), from start
to the written report; seconds are those of the run and of its parts. Results lie in benchmarks/results/scale.json and
are drawn in docs/images/scale.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from overhead import tiny_config, tiny_data, tiny_model

from fedgraft.core.progress import Watch
from fedgraft.simulations.run import simulate

SIZES = (10, 100, 1000, 5000)
RECORDS = 100_000
RESULTS = Path(__file__).parent / "results" / "scale.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "scale.svg"


class Parts(Watch):
    """When the parts of a run began and ended."""

    def __init__(self) -> None:
        self.began = self.joined = time.perf_counter()
        self.seconds: dict[str, float] = {"train": 0.0, "evaluate": 0.0}

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self.joined = time.perf_counter()

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self.seconds[record["kind"]] += record["seconds"]


def peak() -> float:
    """MiB. Not getrusage: its maximum is inherited from the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def measured(folder: Path, sites: int, private: bool) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    before = peak()
    privacy = {"enabled": private, "epsilon": 8.0, "delta": 1e-5}
    config = tiny_config(
        folder,
        sites,
        rounds=1,
        seed=1,  # under which each of 5,000 sites has records on both sides of the split
        task={"labels": list("abcd"), "max_length": 8},
        train={"local_steps": 2, "batch_size": 2, "lr": 0.01},
        privacy=privacy,
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"test_fraction": 0.5})})
    parts = Parts()
    with tempfile.TemporaryDirectory() as output:
        run = simulate(config, Path(output) / "run", watch=parts)
        report = (Path(output) / "run" / "report.html").stat().st_size
    seconds = time.perf_counter() - parts.began
    if run["rounds"] != 1 or any(site["rounds"] != 1 for site in run["sites"].values()):
        raise RuntimeError("a site missed the round")
    return {
        "sites": sites,
        "private": private,
        "peak_mib": round(peak(), 1),
        "before_the_run_mib": round(before, 1),
        "seconds": round(seconds, 2),
        "data_and_joining_seconds": round(parts.joined - parts.began, 2),
        "training_seconds": round(parts.seconds["train"], 2),
        "evaluation_seconds": round(parts.seconds["evaluate"], 2),
        "report_kilobytes": round(report / 1000),
    }


def in_a_process(folder: Path, sites: int, private: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(sites), str(int(private))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 3.2))
    for private, colour, label in ((False, "#1f5f8b", "no privacy"), (True, "#c8553d", "with privacy")):
        mine = [row for row in rows if row["private"] == private]
        sites = [row["sites"] for row in mine]
        memory.plot(sites, [row["peak_mib"] for row in mine], "o-", ms=4, color=colour, label=label)
        seconds.plot(sites, [row["seconds"] for row in mine], "o-", ms=4, color=colour, label=label)
    memory.set_ylim(0, 1.25 * max(row["peak_mib"] for row in rows))
    memory.set_title("peak memory, MiB")
    seconds.set_yscale("log")
    seconds.set_title("seconds for the whole run")
    for axes in (memory, seconds):
        axes.set_xscale("log")
        axes.set_xlabel("sites")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    if arguments.child:
        folder, sites, private = arguments.child
        print(json.dumps(measured(Path(folder), int(sites), bool(int(private)))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", 32)
        tiny_data(folder / "data.csv", RECORDS)
        for private in (False, True):
            for sites in arguments.sizes:
                rows.append(in_a_process(folder, sites, private))
                print(json.dumps(rows[-1]), flush=True)
    growth = {}
    for private in (False, True):
        peaks = [row["peak_mib"] for row in rows if row["private"] == private]
        growth["with privacy" if private else "without privacy"] = round(max(peaks) / peaks[0] - 1, 4)
    results = {
        "what": "peak memory and seconds of one simulated round in one process, by the number of sites",
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__},
        "conditions": f"BERT of 2 layers, hidden 32; {RECORDS} records; 2 steps of batch 2 a site; 2 evaluations",
        # The largest peak over that of the fewest sites.
        "memory_growth": growth,
        "rows": rows,
    }
    print(json.dumps(results["memory_growth"]))
    if tuple(arguments.sizes) == SIZES:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        draw(rows)


if __name__ == "__main__":
    main()
