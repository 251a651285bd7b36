"""fedgraft against Apple's pfl 0.6 on the same federated LoRA job: 100 users of 32 records, 20 of them a round.

    python benchmarks/against_pfl.py                    both models, 5 repeats: about 8 minutes
    python benchmarks/against_pfl.py --repeats 1 --rounds 5 --no-write

pfl wants an older dp-accounting than fedgraft, so it gets a virtual environment of its own (`--venv`, by default in
the user's cache), made when it is not there by these commands; the last one lends it this environment's torch,
transformers and peft, behind its own packages:

    python -m venv VENV
    VENV/bin/pip install pfl==0.6.0 numpy==OURS scipy==OURS
    echo OUR_SITE_PACKAGES > VENV/lib/python3.11/site-packages/lent.pth

Both sides train the same trainables (LoRA of rank 4 on query and value, and the head) of the same untrained BERT from
the same values, on the same tokens, the same 20 users a round, one epoch of batches of 8 by SGD with momentum, without
dropout, privacy or more than one thread. That they compute the same is shown first: three rounds of one step with a
user's whole data must end with the same tensors. In the timed runs the batches of an epoch differ (fedgraft shuffles,
pfl does not), so the number of steps and the loss at the end are told beside the times.

Every run is a fresh process, and the sides take turns. A round is timed from its beginning to the next one's, the first
one left out; fedgraft's has its messages, gate, audit log and checkpoint in it, pfl's has none of these to write. The
whole process is told too, and processor time, which a busy machine upsets less. Writes
benchmarks/results/against_pfl.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import WORDS, tiny_model
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from fedgraft.client.resident import resident
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.progress import Watch
from fedgraft.server.checkpoints import load_last
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import complete, site_data

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "against_pfl.json"
PFL = "0.6.0"
LABELS = "abcd"
USERS, RECORDS, COHORT, BATCH = 100, 32, 20, 8
#: What a row is called, by what it gives as the cohort.
NAMES = {0: "fedgraft", 1: "fedgraft, one site after another"}
#: Hidden size of the two-layer BERT, and what a step of 8 texts takes about on one core.
MODELS = {"tiny BERT, hidden 64": 64, "BERT of 10 ms steps, hidden 256": 256}
#: The same sums in another order.
TOLERANCE = 1e-5


def prepare_venv(folder: Path) -> Path:
    """The Python of an environment with pfl, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making an environment for pfl {PFL} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        same = [f"{name}=={version(name)}" for name in ("numpy", "scipy")]
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"pfl=={PFL}", *same], check=True)
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(own) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        (folder / "ready").touch()
    return python


def write_users(folder: Path) -> None:
    """A table a user, of texts whose words tell the label; one record more than is trained on, to be held out."""
    rng = random.Random(0)
    share = len(WORDS) // len(LABELS)
    for user in range(USERS):
        with (folder / f"u{user:03d}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(RECORDS + 1):
                kind = rng.randrange(len(LABELS))
                own = WORDS[kind * share : (kind + 1) * share]
                words = rng.choices(own, k=6) + rng.choices(WORDS, k=10)
                writer.writerow([" ".join(words), LABELS[kind]])


def job_config(folder: Path, rounds: int, **train: Any) -> RunConfig:
    sites = [{"name": f"u{user:03d}", "path": str(folder / f"u{user:03d}.csv")} for user in range(USERS)]
    return complete(
        parse_config(
            {
                "name": "against-pfl",
                "rounds": rounds,
                "model": str(folder / "model"),
                "method": {"rank": 4},
                "task": {"labels": list(LABELS), "max_length": 16},
                "train": {
                    "local_steps": RECORDS // BATCH,
                    "batch_size": BATCH,
                    "lr": 0.2,
                    "momentum": 0.9,
                    "device": "cpu",
                    **train,
                },
                "privacy": {"enabled": False},
                "evaluate": {"every": 0},
                "server": {"sites_per_round": COHORT},
                # Too little to hold any out by chance: then exactly one record of a user is.
                "data": {"sites": sites, "test_fraction": 1e-9},
            }
        )
    )


class Clock(Watch):
    """The time, and the processor time, when each round began, and when the last one was over."""

    def __init__(self, rounds: int) -> None:
        self.times: list[tuple[float, float]] = []
        self._rounds = rounds

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        if kind == "train" or round == self._rounds:
            self.times.append((time.perf_counter(), time.process_time()))


def ours(folder: Path, cohort: int) -> None:
    """One run of fedgraft in this process, as the parent asks for it."""
    torch.set_num_threads(1)
    config = parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    clock = Clock(config.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        simulate(config, run, execution=Execution(threads=1, cohort=cohort), watch=clock)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        state = load_last(run / "checkpoints").state
    trainings = [line for line in lines if line["kind"] == "train"]
    rounds, cpu = ([after - before for before, after in pairwise(times)] for times in zip(*clock.times, strict=True))
    save_arrays({name: np.ascontiguousarray(array) for name, array in state.items()}, folder / "ours.safetensors")
    print(
        json.dumps(
            {
                "rounds": rounds,
                "cpu": cpu,
                "steps": sum(site["steps"] for line in trainings for site in line["sites"].values()),
                "cohorts": [[config.site_names.index(name) for name in sorted(line["sites"])] for line in trainings],
            }
        )
    )


class Sides:
    """The two sides of one job, whose files lie in ``folder``."""

    def __init__(self, folder: Path, config: RunConfig, python: Path) -> None:
        self.folder, self.config, self._python = folder, config, python
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._describe()

    def _describe(self) -> None:
        model = resident(self.config)
        sites = site_data(self.config)
        parts = []
        for name in self.config.site_names:
            data = sites[name].train
            if len(data) != RECORDS or data.labels is None:
                raise RuntimeError(f"{name} has {len(data)} records to train on")
            examples = model.task.encode(data.inputs, data.labels.tolist(), model.base.processor)
            parts.append(model.task.collate(examples, model.base.processor))
        self._records = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        save_file(self._records, self.folder / "records.safetensors")
        start = model.adapter.read()
        save_arrays({name: np.array(array) for name, array in start.items()}, self.folder / "start.safetensors")
        peft: Any = model.adapter.model.peft_config["default"]  # type: ignore[index]
        self._lora = {
            "task_type": "SEQ_CLS",
            "r": peft.r,
            "lora_alpha": peft.lora_alpha,
            "target_modules": sorted(peft.target_modules),
            "modules_to_save": list(peft.modules_to_save),
        }

    def fedgraft(self, cohort: int) -> dict[str, Any]:
        answer = self._run([sys.executable, __file__, "--ours", str(self.folder), str(cohort)])
        self._cohorts = answer.pop("cohorts")
        return {**answer, "loss": self._loss(load_arrays(self.folder / "ours.safetensors"))}

    def pfl(self) -> dict[str, Any]:
        """Of the users that fedgraft's last run drew."""
        settings = self.config.train
        job = {
            "model": self.config.model,
            "labels": len(LABELS),
            "lora": self._lora,
            "cohorts": self._cohorts,
            "lr": settings.lr,
            "momentum": settings.momentum,
            "batch_size": settings.batch_size,
            "threads": 1,
        }
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        return self._run([str(self._python), str(HERE / "pfl_job.py"), str(self.folder)])

    def apart(self) -> float:
        """The largest difference between the adapters that the two sides ended with."""
        one, other = (load_file(self.folder / f"{side}.safetensors") for side in ("ours", "pfl"))
        if one.keys() != other.keys():
            raise RuntimeError(f"other tensors: {sorted(one.keys() ^ other.keys())}")
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    def _run(self, command: list[str]) -> dict[str, Any]:
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, cwd=self.folder)
        wall = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall}

    def _loss(self, arrays: dict[str, np.ndarray]) -> float:
        """Mean loss of an adapter over all users' training records."""
        model = resident(self.config)
        start = model.adapter.read()
        model.adapter.write(type(start)(start.spec, arrays))
        batch = {name: tensor.flatten(0, 1) for name, tensor in self._records.items()}
        with torch.no_grad():
            loss = float(model.task.losses(model.adapter.model, batch).mean())
        model.adapter.write(start)
        return loss


def same_tensors(folder: Path, python: Path) -> float:
    """How far apart three rounds of one whole-data step end; raises where that is more than rounding."""
    sides = Sides(folder, job_config(folder, 3, local_steps=1, batch_size=RECORDS), python)
    sides.fedgraft(1)
    sides.pfl()
    apart = sides.apart()
    if apart > TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: {apart:.2g} apart after three rounds")
    return apart


def compare(
    name: str, hidden: int, python: Path, rounds: int, repeats: int, cohorts: tuple[int, ...]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model", hidden)
        write_users(folder)
        apart = same_tensors(folder, python)
        sides = Sides(folder, job_config(folder, rounds), python)
        rows: dict[str, list[dict[str, Any]]] = {}
        for number in range(repeats):
            turns: list[tuple[str, Any]] = [(NAMES.get(size, f"fedgraft, cohort {size}"), size) for size in cohorts]
            turns.append(("pfl", None))
            # Who comes first changes, but for the first time, when fedgraft draws the users.
            for side, size in turns if number % 2 == 0 else reversed(turns):
                rows.setdefault(side, []).append(sides.pfl() if size is None else sides.fedgraft(size))
                print(f"{name}, {side}: {rows[side][-1]['wall']:.1f} s", file=sys.stderr)
    steps = rounds * COHORT * RECORDS // BATCH
    for side, runs in rows.items():
        if {run["steps"] for run in runs} != {steps}:
            raise SystemExit(f"{side} took {runs[0]['steps']} steps, not {steps}")
    found = {side: _row(runs, steps // rounds) for side, runs in rows.items()}
    theirs = rows["pfl"]
    for side, runs in rows.items():
        pairs = list(zip(theirs, runs, strict=True))
        for what, key in (("rounds", "times_as_fast_as_pfl"), ("cpu", "times_as_fast_by_processor_time")):
            ratios = [statistics.median(a[what][1:]) / statistics.median(b[what][1:]) for a, b in pairs]
            found[side][key] = {
                name: round(of(ratios), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))
            }
        found[side]["process_times_as_fast"] = round(statistics.median(a["wall"] / b["wall"] for a, b in pairs), 3)
    return {"case": name, "same_tensors_within": apart, "rounds": rounds, "steps": steps, "sides": found}


def _row(runs: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    a_round = statistics.median(second for run in runs for second in run["rounds"][1:])
    return {
        "seconds_per_round": round(a_round, 4),
        "processor_seconds_per_round": round(statistics.median(second for run in runs for second in run["cpu"][1:]), 4),
        "steps_per_second": round(steps / a_round, 1),
        "process_seconds": round(statistics.median(run["wall"] for run in runs), 2),
        "loss_at_the_end": round(statistics.median(run["loss"] for run in runs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--venv", type=Path, default=cache / "fedgraft" / f"pfl-{PFL}", help="environment with pfl")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[0, 1], help="Execution(cohort=...) of each row")
    parser.add_argument("--only", type=int, nargs="+", default=list(MODELS.values()), help="hidden sizes")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        ours(Path(arguments.ours[0]), int(arguments.ours[1]))
        return
    if arguments.rounds < 2:
        parser.error("--rounds: the first round is not counted, so give 2 or more")
    torch.set_num_threads(1)
    python = prepare_venv(arguments.venv.absolute())
    results = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__},
        "pfl": PFL,
        "job": {"users": USERS, "records": RECORDS, "users_a_round": COHORT, "batch": BATCH, "lora_rank": 4},
        "repeats": arguments.repeats,
        "cases": [
            compare(name, hidden, python, arguments.rounds, arguments.repeats, arguments.cohorts)
            for name, hidden in MODELS.items()
            if hidden in arguments.only
        ],
    }
    text = json.dumps(results, indent=2) + "\n"
    if not arguments.no_write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
