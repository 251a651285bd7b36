"""The in-process engine against Flower's own simulation engine, Ray, on the same job of 10 and of 100 sites, 3 rounds.

    python benchmarks/against_ray.py                 writes benchmarks/results/against_ray.json; about 7 minutes
    python benchmarks/against_ray.py --sites 10      the other line is kept

A site takes four steps a round on a tiny BERT with LoRA. Four ways, by turns, each in a process of its own:
`inprocess` as the command line runs it (`--cohort 0`: it measures whether sites share their passes) and with one
site after another; `flower`, which is `flwr run` on a SuperLink that ends with the run; and `run_simulation`,
Flower's older Python function, which warns that it will go. All run the same ServerApp and ClientApp and must end
with the same adapter (to 1e-5: Ray's actors answer in any order, but updates are added in the order of the sites'
names).

Overhead is wall time minus arithmetic, and arithmetic is a bare PyTorch loop of the same steps and evaluations, one
site after another on one thread, timed before each run. Ray shares the steps among its actors, one a core, so that
part of the arithmetic that is subtracted from its time was never in it: the ratio errs in Ray's favour. Where sites
share their passes a run may take less than the bare loop; no ratio is told then. Medians count. Told for the run
alone, and for the whole process with its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import bare_loop, tiny_config, tiny_data, tiny_model

from fedgraft.client.resident import resident
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.server.app import run_on
from fedgraft.server.checkpoints import load_last
from fedgraft.simulations.app import make_simulated_client
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import site_data

RESULTS = Path(__file__).parent / "results" / "against_ray.json"
ALONE = "inprocess, one site after another"
OURS = {"inprocess": 0, ALONE: 1}
WAYS = (*OURS, "flower", "run_simulation")
ROUNDS, RECORDS = 3, 40
TOLERANCE = 1e-5
#: How often the ways take turns, by the number of sites.
REPEATS = {10: 3, 100: 1}
#: Runs in process at each of its turns, for they are short.
IN_PROCESS = 3


def job(folder: Path, sites: int) -> RunConfig:
    tiny_model(folder / "model", 64)
    tiny_data(folder / "data.csv", RECORDS * sites)
    return tiny_config(
        folder,
        sites,
        rounds=ROUNDS,
        train={"local_steps": 4, "batch_size": 8, "lr": 0.01, "device": "cpu"},
        # Of each site one record or two are held out, and evaluated before and after.
        data={
            "path": str(folder / "data.csv"),
            "sites": [f"s{number:04d}" for number in range(sites)],
            "partition": "iid",
            "test_fraction": 0.02,
        },
    )


def run(way: str, config: RunConfig, output: Path) -> float:
    """Seconds of one run in this process."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    if way == "run_simulation":
        _run_simulation(config, output)
    else:
        execution = Execution("inprocess", threads=1, cohort=OURS[way]) if way in OURS else Execution("flower")
        simulate(config, output, execution=execution)
    return time.perf_counter() - began


def _run_simulation(config: RunConfig, output: Path) -> None:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        run_on(grid, config, output, engine="flower", resume=False)

    site_data(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server,
            make_simulated_client(output),
            num_supernodes=len(config.site_names),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
        )


def child(way: str, folder: Path) -> dict[str, Any]:
    """One run in a process of its own: seconds of the run, of the process, and the adapter it ended with."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "run"
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--run", way, str(folder / "config.json"), str(output)],
            capture_output=True,
            text=True,
            env=environment,
        )
        wall = time.perf_counter() - began
        if done.returncode or not (output / "checkpoints").exists():
            raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
        state = load_last(output / "checkpoints").state
    return {"run": json.loads(done.stdout.splitlines()[-1])["seconds"], "process": wall, "state": state}


def bare_evaluations(config: RunConfig) -> Callable[[], float]:
    """What takes the forward passes of the evaluations before and after a run, and gives its seconds."""
    model = resident(config)
    held_out = [
        model.task.encode(data.held_out.inputs, data.held_out.labels.tolist(), model.base.processor)
        for data in site_data(config).values()
    ]

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for examples in held_out * 2:
                model.task.counts(model.adapter.model, model.task.collate(examples, model.base.processor))
        return time.perf_counter() - began

    return run


def compare(sites: int, repeats: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = job(folder, sites)
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        loop, evaluations = bare_loop(config), bare_evaluations(config)
        loop()
        for number in range(repeats):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                for _ in range(IN_PROCESS if way in OURS else 1):
                    arithmetic = loop() + evaluations()
                    runs[way].append({"arithmetic": arithmetic, **child(way, folder)})
                    print(f"{sites} sites, {way}: {runs[way][-1]['run']:.1f} s", file=sys.stderr)
    steps = statistics.median(each["arithmetic"] for found in runs.values() for each in found)
    first = runs["inprocess"][0]["state"]
    lines = {}
    for way, found in runs.items():
        apart = max(float(np.abs(each["state"][name] - first[name]).max()) for each in found for name in first)
        if apart > TOLERANCE:
            raise SystemExit(f"{way} ended {apart:.2g} away from the in-process run")
        lines[way] = {
            f"{what}_{part}": round(statistics.median(of(each) for each in found), 2)
            for what in ("run", "process")
            for part, of in (
                ("seconds", lambda each, what=what: each[what]),
                ("overhead_seconds", lambda each, what=what: each[what] - each["arithmetic"]),
            )
        }
        lines[way]["away_from_inprocess"] = apart
    for way in WAYS[len(OURS) :]:
        for ours in OURS:
            key = "run_overhead_seconds"
            least = lines[ours][key]
            lines[way][f"times_the_overhead_of_{ours}"] = round(lines[way][key] / least, 1) if least > 0 else None
    return {"sites": sites, "rounds": ROUNDS, "repeats": repeats, "arithmetic_seconds": round(steps, 2), **lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=list(REPEATS))
    parser.add_argument("--repeats", type=int, help="instead of 3 for 10 sites and 1 for 100")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, config, output = arguments.run
        seconds = run(way, parse_config(json.loads(Path(config).read_text(encoding="utf-8"))), Path(output))
        print(json.dumps({"seconds": seconds}))
        return
    torch.set_num_threads(1)
    found = [compare(sites, arguments.repeats or REPEATS.get(sites, 1)) for sites in arguments.sites]
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "overhead": found,
    }
    if not arguments.no_write:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))["overhead"] if RESULTS.exists() else []
        kept = [line for line in kept if line["sites"] not in arguments.sites]
        results["overhead"] = sorted([*kept, *found], key=lambda line: line["sites"])
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
