"""How much noise client-level privacy needs for so many sites, and patient-level privacy for so many patients.

    python benchmarks/central.py             writes benchmarks/results/central.json and prints two tables

Accounting only; nothing is trained. Both figures are the noise std on each coordinate of a mean, over the clip: of the
sites' changes in a round, and of the patients' gradients in a step.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.privacy import calibrate_noise
from fedgraft.privacy.central import CentralPlan

RESULTS = Path(__file__).parent / "results" / "central.json"
EPSILONS = (1.0, 2.0, 4.0, 8.0)
SITES = (3, 10, 30, 100, 300, 1000, 10000)
ROUNDS = 50
#: Numbers that the sites share: about LoRA of rank 8 on two projections of six layers of 384, and a head.
PARAMETERS = 82454
#: Patients of a site, expected batch, steps, delta.
PATIENTS = ((1000, 100, 300, 1e-4), (5000, 256, 1000, 1e-5), (50000, 1024, 1000, 1e-6))


def central(sites: int, target: float) -> dict[str, float | int | None]:
    """All sites asked in each round; delta n^-1.1, as is usual."""
    delta = sites**-1.1
    config = parse_config(
        {
            "model": "none",
            "rounds": ROUNDS,
            "central": {"enabled": True, "epsilon": target, "delta": delta},
            "data": {"path": "none", "sites": [f"site-{number}" for number in range(sites)]},
        }
    )
    row: dict[str, float | int | None] = {"sites": sites, "epsilon": target, "delta": delta}
    try:
        plan = CentralPlan.for_run(config, ROUNDS)
    except UserError:
        return {**row, "noise_multiplier": None, "noise_per_coordinate": None, "noise_norm": None}
    return {
        **row,
        "noise_multiplier": plan.noise_multiplier,
        "noise_per_coordinate": plan.noise_on_mean,
        "noise_norm": plan.noise_norm(PARAMETERS),
    }


def local(patients: int, batch: int, steps: int, delta: float, target: float) -> dict[str, float | int]:
    noise = calibrate_noise(target, delta, batch / patients, steps)
    return {
        "patients": patients,
        "batch": batch,
        "steps": steps,
        "epsilon": target,
        "delta": delta,
        "noise_multiplier": noise,
        "noise_per_coordinate": noise / batch,
        "noise_norm": math.sqrt(PARAMETERS) * noise / batch,
    }


def table(head: str, rows: dict[str, list[dict[str, float | int | None]]]) -> None:
    print(f"\n{head:54}" + "".join(f"{f'epsilon {target:g}':>20}" for target in EPSILONS))
    for name, cells in rows.items():
        shown = [
            f"{cell['noise_per_coordinate']:.4f} ({cell['noise_norm']:,.3g})" if cell["noise_norm"] else "refused"
            for cell in cells
        ]
        print(f"{name:54}" + "".join(f"{text:>20}" for text in shown))


def main() -> None:
    began = time.monotonic()
    by_sites = {sites: [central(sites, target) for target in EPSILONS] for sites in SITES}
    by_patients = {case: [local(*case, target) for target in EPSILONS] for case in PATIENTS}
    print("noise std on each coordinate of the mean over the clip, and the noise's length over the clip")
    table(
        f"central, {ROUNDS} rounds, all sites asked",
        {f"{sites:,} sites, delta {cells[0]['delta']:.1g}": cells for sites, cells in by_sites.items()},
    )
    table(
        "patients at one site, DP-SGD",
        {f"{n:,} patients, {b} a step, {s} steps, delta {d:g}": by_patients[n, b, s, d] for n, b, s, d in PATIENTS},
    )
    seconds = round(time.monotonic() - began, 1)
    print(f"\n{PARAMETERS:,} numbers shared; {seconds} s")
    results = {
        "parameters": PARAMETERS,
        "rounds": ROUNDS,
        "sampling_rate": 1.0,
        "seconds": seconds,
        "central": [cell for cells in by_sites.values() for cell in cells],
        "patients": [cell for cells in by_patients.values() for cell in cells],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
