"""How often the audit cries wolf, what it catches, how tight its lower bound is, and how long it takes.

    python benchmarks/audit.py                 50 honest audits, the self-test, the lower bound
    python benchmarks/audit.py --quickstart    also the quickstart's own plan, model and data, with its self-test

Writes benchmarks/results/audit.json and prints it. Everything draws from the operating system: two runs differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgraft.client.audit import Audit
from fedgraft.client.audit.canaries import canary_config, synthetic_records
from fedgraft.client.audit.selftest import self_test
from fedgraft.client.audit.subject import subject
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.audit.lower_bound import lower_bound, scores
from fedgraft.simulations.audit import run

RESULTS = Path(__file__).parent / "results"
#: The honest audits take these in turn: sections of the canary plan that are changed.
PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "patients, LoRA, Poisson": {},
    "records, BitFit": {"method": {"name": "bitfit"}, "privacy": {"unit": "record", "records_per_patient": 1}},
    "patients, LoRA, by turns with correlated noise": {"privacy": {"sampler": "cyclic", "bands": 3}},
    "patients, prefix, adaptive clip": {"method": {"name": "prefix"}, "privacy": {"clip_quantile": 0.5}},
    "patients, (IA)3, AdamW": {"method": {"name": "ia3"}, "train": {"optimizer": "adamw"}},
}


def plan(folder: Path, changes: dict[str, dict[str, Any]]) -> RunConfig:
    values = canary_config(folder).model_dump(mode="json")
    return parse_config({**values, **{name: {**values[name], **keys} for name, keys in changes.items()}})


def honest(folder: Path, runs: int) -> dict[str, Any]:
    """Audits of training in which nothing is broken: every alarm is a false one."""
    alarms: list[dict[str, Any]] = []
    smallest: list[float] = []
    seconds = []
    plans = {name: plan(folder, changes) for name, changes in PLANS.items()}
    for number in range(runs):
        name, config = list(plans.items())[number % len(plans)]
        began = time.perf_counter()
        one = subject(config, "canary", synthetic_records(config, 160), units=128)
        verdicts = Audit(one, canaries=128).run()
        seconds.append(time.perf_counter() - began)
        alarms += [
            {"run": number, "plan": name, "layer": v.layer, "findings": v.findings} for v in verdicts if not v.good
        ]
        looks = verdicts[2].statistics
        # Bonferroni: the smallest p-value, times the number of tests, against alpha.
        smallest.append(min(looks["smallest_p"].values()) * looks["tests"])
        print(f"honest {number + 1}/{runs}: {name}: {'good' if all(v.good for v in verdicts) else 'ALARM'}", flush=True)
    return {
        "runs": runs,
        "plans": list(plans),
        "false_alarms": len(alarms),
        "alarms": alarms,
        "smallest_p_times_tests": round(min(smallest), 4),
        "alpha": 1e-3,
        "seconds_median": round(statistics.median(seconds), 2),
    }


def caught(folder: Path) -> dict[str, Any]:
    config = plan(folder, {})
    one = subject(config, "canary", synthetic_records(config, 400), units=256)
    began = time.perf_counter()
    found = self_test(one)
    return {
        "bugs": {entry.fault: entry.by for entry in found},
        "missed": [entry.fault for entry in found if not entry.good],
        "seconds": round(time.perf_counter() - began, 1),
    }


def tightness(repeats: int = 60) -> list[dict[str, Any]]:
    """The bound for 256 canaries that have nothing in common, four steps, everybody in each, delta 1e-5."""
    random, size, m, steps, delta = np.random.default_rng(), 4096, 256, 4, 1e-5
    rows = []
    for claimed_noise, true_noise in ((4.0, 4.0), (4.0, 2.0), (4.0, 0.0)):
        claim = epsilon((Event(claimed_noise, 1.0, steps),), delta)
        truth = epsilon((Event(true_noise, 1.0, steps),), delta) if true_noise else math.inf
        bounds = []
        for _ in range(repeats):
            canaries = torch.nn.functional.normalize(torch.from_numpy(random.standard_normal((m, size))), dim=1)
            coins = random.random(m) < 0.5
            clean = torch.from_numpy(coins.astype(float)) @ canaries
            released = clean + true_noise * torch.from_numpy(random.standard_normal((steps, size)))
            verdict = lower_bound(scores(canaries, released, claimed_noise), coins, claim, delta)
            bounds.append((verdict.statistics["bound"], verdict.good))
        rows.append(
            {
                "claimed_epsilon": round(claim, 2),
                "true_epsilon": round(truth, 2) if true_noise else "infinite",
                "bound_median": round(statistics.median(bound for bound, _ in bounds), 2),
                "caught": f"{sum(not good for _, good in bounds)} of {repeats}",
            }
        )
    return rows


def quickstart() -> dict[str, Any]:
    began = time.perf_counter()
    report = run.audit(run.target("hospitals-icd10", []))
    alone = time.perf_counter() - began
    began = time.perf_counter()
    tested = run.audit(run.target("hospitals-icd10", []), test_itself=True)
    return {
        "good": report["good"] and tested["good"],
        "seconds": round(alone, 1),
        "seconds_with_self_test": round(time.perf_counter() - began, 1),
        "layers": {layer["layer"]: layer["said"] for layer in report["layers"]},
        "bugs": {entry["fault"]: entry["by"] for entry in tested["self_test"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "audit.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads",
            "honest": honest(Path(folder), options.runs),
            "self_test": caught(Path(folder)),
            "lower_bound": tightness(),
        }
    if options.quickstart:
        found["quickstart"] = quickstart()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
