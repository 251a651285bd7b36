"""Accuracy of the quickstart with the patient as the unit, with the record, and without privacy, by the same recipe.

    python benchmarks/quickstart.py [--repeats N]     writes benchmarks/results/quickstart.json and prints a table

With privacy the noise comes from the operating system, so every repetition differs; without it one run says it all. The
sites are simulated, so what they get right is counted exactly here; `make demo` shows the noised counts of a real site.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import load_scenario

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
CASES = {
    "patient": ["evaluate.release=exact_not_private"],
    "record": ["privacy.unit=record", "evaluate.release=exact_not_private"],
    "none": ["privacy.enabled=false"],
}


def case(name: str, repeats: int) -> dict[str, object]:
    overrides = CASES[name]
    config = load_scenario("hospitals-icd10", overrides)
    runs = []
    for _ in range(repeats if config.privacy.enabled else 1):
        with tempfile.TemporaryDirectory() as scratch:
            run = simulate(config, Path(scratch) / "run")
            lines = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
        runs.append(
            {
                "accuracy_by_round": [round(x["accuracy"], 4) for x in lines if x["kind"] == "evaluate"],
                "epsilon": max((site["epsilon"] or 0.0) for site in run["sites"].values()) or None,
                "noise_multiplier": {
                    name: round(site["privacy"]["noise_multiplier"], 3)
                    for name, site in run["sites"].items()
                    if site["privacy"]
                },
                "seconds": run["seconds"],
            }
        )
        print(name, runs[-1], flush=True)
    return {"unit": name, "overrides": overrides, "delta": config.privacy.delta, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=sorted(CASES), action="append")
    arguments = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": []}
    cases = {entry["unit"]: entry for entry in before["cases"]}
    for name in arguments.only or CASES:
        cases[name] = case(name, arguments.repeats)
        conditions = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        results = {"conditions": conditions, "cases": list(cases.values())}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
