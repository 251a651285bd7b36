"""What a deployment costs beside the arithmetic: seconds of a round, and memory, the warm worker beside Flower's way.

    python benchmarks/deployment.py                    three sites, MiniLM and LoRA, some ten minutes
    python benchmarks/deployment.py --tiny --rounds 2  a tiny model, to see that it runs

SuperLink, three SuperNodes, and what answers for each of them are processes of this machine that speak over loopback
without TLS. Ways: `plain` (flower-supernode as it is: a process a message), `quick` (the same, polling ten times a
second), `warm` (this site's own worker). The ways take turns; medians of all rounds but the first, which loads.
Arithmetic is what one process needs for the same rounds, all sites one after another on one thread, divided by the
cores. Each site has its own folder, policy and data, and the job trains with privacy.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedgraft.client.policy import unrestricted
from fedgraft.client.warm.command import fresh_secret, supernode_options, worker_command

RESULTS = Path(__file__).parent / "results"
SITES = ("north", "east", "south")
WAYS = ("plain", "quick", "warm")
_POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
_BUNDLE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedgraft-job"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedgraft"
[tool.flwr.app.components]
serverapp = "fedgraft.server.app:app"
clientapp = "fedgraft.client.app:app"
[tool.flwr.app.config]
config = ""
set = ""
output = ""
resume = ""
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Loopback:
    """A SuperLink and, for each of ``sites`` (name: its folder, with policy.toml), a SuperNode with what answers.

    Everything lies in ``folder``; each process writes ``NAME.log`` there. ``way``: see :data:`WAYS`.
    """

    def __init__(
        self, folder: Path, sites: Mapping[str, Path], way: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.sites = sites
        self.way = way
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._link = f"127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            # Without a way out it holds every start up for most of a minute.
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **({} if way == "plain" else {_POLL: "0.1"}),
            **(environment or {}),
        }

    def __enter__(self) -> Loopback:
        (self.folder / "flwr").mkdir(parents=True)
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink.dev]\naddress = "{self._link}"\ninsecure = true\n'
        )
        self.begin("superlink", "flower-superlink", "--insecure", *_at(self._link), "--database", "link.db")
        _until_open(self._link)
        for site in self.sites:
            self.begin_site(site)
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.processes.values()):
            _end(process)

    def begin(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def begin_site(self, site: str) -> None:
        folder, runtime = self.sites[site].resolve(), f"127.0.0.1:{free_port()}"
        node = f'site="{site}" site-folder="{folder}"'
        secret = fresh_secret(folder)
        more = supernode_options(secret) if self.way == "warm" else []
        command = ("flower-supernode", "--insecure", "--superlink", self._link, *_at(runtime), *more)
        self.begin(f"{site}-node", *command, "--node-config", node)
        if self.way == "warm":
            self.begin(f"{site}-worker", *worker_command(folder, runtime, secret))

    def submit(self, config: Path, output: Path, files: Mapping[str, str] | None = None) -> None:
        """Have a job run; ``files``: what its bundle holds beside its configuration."""
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        for name, text in {"pyproject.toml": _BUNDLE, **(files or {})}.items():
            (app / name).write_text(text)
        settings = f'config="{config}" output="{output}"'
        done = subprocess.run(
            ["flwr", "run", str(app), "dev", "--run-config", settings],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"flwr run: {done.stdout}{done.stderr}")

    def wait(self, output: Path, seconds: float) -> dict[str, Any]:
        """run.json of a job that has come to its end. Raises :class:`RuntimeError` where it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                run = json.loads((output / "run.json").read_text())
                if run["status"] != "running":
                    return run
            time.sleep(0.2)
        raise RuntimeError(f"{output}: the job did not end within {seconds:g} s; see the logs in {self.folder}")

    def memory(self) -> dict[str, int]:
        """Resident MiB of each process; what a process began counts on its own."""
        found = {}
        for name, process in self.processes.items():
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                for number, each in enumerate([root, *root.children(recursive=True)]):
                    with contextlib.suppress(psutil.Error):
                        label = " ".join(Path(part).name for part in each.cmdline()[:5] if not part.startswith("-"))
                        found[f"{name}{f' / {number}: {label}' if number else ''}"] = each.memory_info().rss >> 20
        return found


def _at(address: str) -> tuple[str, ...]:
    host, port = address.split(":")
    return "--host", host, "--port", port


def _until_open(address: str, seconds: float = 60.0) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers at {address}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it began."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.kill()
    process.wait()


def make_sites(folder: Path, config: Any, policy: str) -> dict[str, Path]:
    """A folder for each site of ``config`` with its own share of the records, and ``policy`` (with {data} in it)."""
    from fedgraft.simulations.scenario import site_data

    sites = {}
    labels = config.task.labels
    for name, data in site_data(config).items():
        path = folder / name
        path.mkdir(parents=True)
        with (path / "records.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "patient"])
            records = data.train
            for at, text in enumerate(records.inputs):
                writer.writerow([text, labels[records.labels[at]], records.patients[at] if records.patients else at])
        (path / "policy.toml").write_text(policy.replace('"the scenario\'s"', '"records.csv"'), encoding="utf-8")
        sites[name] = path
    return sites


def deployed_config(config: Any, path: Path) -> Path:
    """``config`` as the job of real sites, which have their own data."""
    values = json.loads(config.to_json())
    values["data"] = {"sites": list(config.site_names), "patient_column": "patient"}
    values.pop("simulation", None)
    path.write_text(tomli_w.dumps(_without_none(values)))
    return path


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def rounds_of(output: Path) -> list[float]:
    """Seconds of each round, its evaluation included."""
    seconds: dict[int, float] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seconds[entry["round"]] = seconds.get(entry["round"], 0.0) + entry["seconds"]
    return [seconds[number] for number in sorted(seconds)]


def job(tiny: bool, rounds: int, scratch: Path) -> Any:
    from fedgraft.simulations.scenario import complete, load_scenario

    listed = ", ".join(f'"{site}"' for site in SITES)
    changes = [f"data.sites=[{listed}]", f"rounds={rounds}", "data.max_per_class=300", "train.device=cpu"]
    if tiny:
        changes += ["model=builtin:tiny-bert", "train.local_steps=2", "data.max_per_class=40", "train.batch_size=20"]
    return complete(load_scenario("hospitals-icd10", changes))


def measured(way: str, config: Any, scratch: Path, seconds: float) -> dict[str, Any]:
    folder = scratch / way
    sites = make_sites(folder / "sites", config, unrestricted().text)
    output = folder / "run"
    began = time.monotonic()
    with Loopback(folder / "processes", sites, way) as loopback:
        loopback.submit(deployed_config(config, folder / "job.toml"), output)
        most: dict[str, int] = {}
        run: dict[str, Any] | None = None
        while run is None:
            with contextlib.suppress(RuntimeError):
                run = loopback.wait(output, 2.0)
            for name, size in loopback.memory().items():
                most[name] = max(most.get(name, 0), size)
            if time.monotonic() - began > seconds:
                raise RuntimeError(f"{way}: not done within {seconds:g} s; see {folder}")
    if run["status"] != "finished":
        raise RuntimeError(f"{way}: {run}")
    return {"seconds": rounds_of(output), "memory": most, "all": round(time.monotonic() - began, 1)}


def arithmetic(config: Any, scratch: Path) -> list[float]:
    """Seconds of each round in one process on one thread."""
    from fedgraft.simulations.run import simulate

    output = scratch / "simulated"
    simulate(config, output)
    return rounds_of(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=WAYS, action="append")
    parser.add_argument("--seconds", type=float, default=500.0, help="patience with one way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        config = job(arguments.tiny, arguments.rounds, scratch)
        cores = os.cpu_count() or 1
        alone = statistics.median(arithmetic(config, scratch)[1:])
        found: dict[str, Any] = {}
        for way in arguments.only or WAYS:
            result = measured(way, config, scratch, arguments.seconds)
            later = statistics.median(result["seconds"][1:])
            found[way] = {
                "seconds_a_round": round(later, 2),
                "beyond_arithmetic": round(later - alone / cores, 2),
                "each_round": [round(each, 2) for each in result["seconds"]],
                "peak_mib": result["memory"],
                "seconds_in_all": result["all"],
            }
            print(way, json.dumps(found[way]), flush=True)
    results = {
        "conditions": f"{platform.processor() or platform.machine()}, {cores} cores, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, load {os.getloadavg()[0]:.1f}, no TLS, "
        f"{'tiny BERT' if arguments.tiny else 'MiniLM'}, LoRA, {len(SITES)} sites",
        "arithmetic_one_thread": round(alone, 2),
        "ways": found,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "deployment-tiny.json" if arguments.tiny else "deployment.json"
    (RESULTS / name).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
