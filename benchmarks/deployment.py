"""What a deployment costs beside the arithmetic: seconds of a round and memory, fedgraft's way beside Flower's.

    python benchmarks/deployment.py                    the quickstart's model at three sites, some fifteen minutes
    python benchmarks/deployment.py --tiny --rounds 2  a tiny model, to see that it runs

Server, three sites and what answers for each are processes of this machine that speak over loopback. Ways:
`fedgraft` and `fedgraft-plain` (`fedgraft server start` and `fedgraft site start`, with TLS, registered keys and the
sites' workers; with differential privacy, and without), `flower` (flower-superlink and flower-supernode as they come: a
process a message, no TLS, no keys; the same private job). Medians of all rounds but the first, which loads; a round's
evaluation belongs to it. Each site has its own folder, policy and data. Arithmetic is what one process needs for the
same rounds of the same job, all sites one after another on one thread, divided by the cores. The adapter of
`fedgraft-plain` is compared with that process's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is there: the arithmetic is said to be of one thread, and each site has its part of the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
from safetensors.numpy import load_file

from fedgraft.core.config import RunConfig
from fedgraft.deployment.processes import end, environment, free_port, launch
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control
from fedgraft.server.rundir import read_metrics, read_run
from fedgraft.simulations.loopback.dealing import with_files
from fedgraft.simulations.loopback.policies import policy_for
from fedgraft.simulations.loopback.running import Loopback
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import load_scenario

RESULTS = Path(__file__).parent / "results"
SITES = ("north", "east", "south")
WAYS = ("fedgraft", "fedgraft-plain", "flower")
Processes = Mapping[str, subprocess.Popen[bytes]]


def prepared(tiny: bool, rounds: int, private: bool, scratch: Path) -> RunConfig:
    """The job of three sites, each with a file of its own in ``scratch``."""
    listed = ", ".join(f'"{site}"' for site in SITES)
    changes = [f"data.sites=[{listed}]", f"rounds={rounds}", "train.device=cpu", f"privacy.enabled={private}".lower()]
    # Little arithmetic, so that what lies beside it is not lost in the arithmetic's own noise.
    changes += ["data.max_per_class=300", "train.local_steps=2"]
    if tiny:
        changes += ["model=builtin:tiny-bert", "data.max_per_class=40", "train.batch_size=20"]
    changes += ["server.join_timeout=300"]
    return with_files(load_scenario("hospitals-icd10", changes), scratch / "data")


@contextmanager
def fedgraft(config: RunConfig, scratch: Path) -> Iterator[tuple[Processes, Path]]:
    """A provisioned federation: its processes, and the run directory."""
    loopback = Loopback(scratch / "federation", config)
    loopback.provision()
    with loopback.running(print):
        control = Control(loopback.server)
        name, _ = jobs.submit(loopback.server, control, config, "measured")
        yield loopback.processes, loopback.server.runs / name
        control.close()


@contextmanager
def flower(config: RunConfig, scratch: Path) -> Iterator[tuple[Processes, Path]]:
    """Flower's own commands, which start a process for each message."""
    home, link, output = scratch / "flwr", f"127.0.0.1:{free_port()}", scratch / "run"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.dev]\naddress = "{link}"\ninsecure = true\n')
    surroundings, logs = environment(home), scratch / "logs"
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def begin(name: str, *command: str) -> None:
        processes[name] = launch(
            [str(Path(sys.executable).parent / command[0]), *command[1:]], surroundings, logs / name
        )

    try:
        begin("server", "flower-superlink", "--insecure", *_at(link), "--database", str(scratch / "link.db"))
        for site in config.site_names:
            folder = scratch / site
            folder.mkdir()
            (folder / "policy.toml").write_text(policy_for(config, site))
            about = f'site="{site}" site-folder="{folder}"'
            own = _at(f"127.0.0.1:{free_port()}")
            begin(site, "flower-supernode", "--insecure", "--superlink", link, *own, "--node-config", about)
        time.sleep(20)
        app = scratch / "app"
        zipfile.ZipFile(io.BytesIO(jobs.bundle(config).content)).extractall(app)
        command = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "dev"]
        command += ["--run-config", f'output="{output}"']
        done = subprocess.run(command, env=surroundings, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"flwr run: {done.stdout}{done.stderr}")
        yield processes, output
    finally:
        for process in reversed(processes.values()):
            end(process)


def _at(address: str) -> tuple[str, ...]:
    host, port = address.split(":")
    return "--host", host, "--port", port


def memory(processes: Processes) -> dict[str, int]:
    """Resident MiB of each process; what a process began counts on its own."""
    found = {}
    for name, process in processes.items():
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            for each in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    label = " ".join(Path(part).name for part in each.cmdline()[1:4] if not part.startswith("-"))
                    key = f"{name} ({each.pid}): {label}"
                    found[key] = each.memory_info().rss >> 20
    return found


def measured(way: str, config: RunConfig, scratch: Path, seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    most: dict[str, int] = {}
    with (flower if way == "flower" else fedgraft)(config, scratch) as (processes, output):
        while True:
            with contextlib.suppress(OSError, ValueError):
                run = json.loads((output / "run.json").read_text())
                if run["status"] != "running":
                    break
            for name, size in memory(processes).items():
                most[name] = max(most.get(name, 0), size)
            if time.monotonic() - began > seconds:
                raise RuntimeError(f"{way}: not done within {seconds:g} s; see {scratch}")
            time.sleep(0.5)
    if run["status"] != "finished":
        raise RuntimeError(f"{way}: {run['error']}")
    return {"seconds": rounds_of(output), "memory": most, "all": time.monotonic() - began, "output": output}


def rounds_of(output: Path) -> list[float]:
    """Seconds of each round, its evaluation included; the first is the evaluation before it."""
    seconds: dict[int, float] = {}
    for line in read_metrics(output):
        seconds[line["round"]] = seconds.get(line["round"], 0.0) + line["seconds"]
    return [seconds[number] for number in sorted(seconds)]


def apart(one: Path, two: Path) -> float:
    """The largest difference between two runs' final adapters."""
    first, second = (load_file(read_run(run)["adapter_path"] + "/adapter_model.safetensors") for run in (one, two))
    return max(float(np.abs(first[key] - second[key]).max()) for key in first.keys() | second.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="writes nothing")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=WAYS, action="append")
    parser.add_argument("--seconds", type=float, default=900.0, help="patience with one way")
    arguments = parser.parse_args()
    cores, found, alone = os.cpu_count() or 1, {}, {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        for way in arguments.only or WAYS:
            private, scratch = way != "fedgraft-plain", Path(place) / way
            scratch.mkdir()
            config = prepared(arguments.tiny, arguments.rounds, private, scratch)
            if private not in alone:
                simulated = scratch / "simulated"
                simulate(config, simulated)
                alone[private] = statistics.median(rounds_of(simulated)[2:])
            result = measured(way, config, scratch, arguments.seconds)
            later = statistics.median(result["seconds"][2:])
            found[way] = {
                "seconds_a_round": round(later, 2),
                "arithmetic_one_thread": round(alone[private], 2),
                "beyond_arithmetic": round(later - alone[private] / cores, 2),
                "each_round": [round(each, 2) for each in result["seconds"]],
                "peak_mib": dict(sorted(result["memory"].items(), key=lambda entry: -entry[1])[:12]),
                "seconds_in_all": round(result["all"], 1),
            }
            if not private:
                found[way]["apart_from_in_process"] = apart(result["output"], simulated)
            print(way, json.dumps(found[way]), flush=True)
            shutil.rmtree(scratch)
    results = {
        "conditions": f"{platform.machine()}, {cores} cores, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, load before {load:.1f}, {len(SITES)} sites, "
        f"{arguments.rounds} rounds",
        "ways": found,
    }
    if not arguments.tiny:
        (RESULTS / "deployment.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
