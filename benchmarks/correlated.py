"""What correlated noise is worth: the error of a run's running sums at the same epsilon, by bands and sampler.

    python benchmarks/correlated.py      writes benchmarks/results/correlated.json and prints a table

The error is the root mean square, over the steps of a run, of the noise in the sum of all released mean gradients so
far, per coordinate, over the clip: what an optimiser with a constant rate and no momentum carries in its weights. Each
row is calibrated to the same (epsilon, delta). Deterministic; nothing is trained.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import calibrate_noise
from fedgraft.privacy.correlated import prefix_error
from fedgraft.privacy.turns import Turns

RESULTS = Path(__file__).parent / "results" / "correlated.json"
#: units, batch, steps, epsilon, delta
SETTINGS = [
    (1000, 100, 40, 8.0, 1e-4),
    (1000, 100, 40, 2.0, 1e-4),
    (5000, 250, 400, 8.0, 1e-5),
    (5000, 250, 400, 1.0, 1e-5),
]


def row(sampler: str, bands: int, units: int, batch: int, steps: int, target: float, delta: float) -> dict[str, object]:
    turns = Turns(sampler, units, batch, bands=bands)
    event = turns.event(1.0, turns.begun(1.0, 0, steps, ()))
    try:
        noise = calibrate_noise(target, delta, event.sampling_rate, event.steps)
    except UserError as error:
        return {"sampler": sampler, "bands": bands, "refused": str(error)}
    largest, mean = prefix_error(bands, steps)
    return {
        "sampler": sampler,
        "bands": bands,
        "noise": round(noise, 4),
        "rms": round(noise * math.sqrt(mean) / batch, 5),
        "last": round(noise * math.sqrt(largest) / batch, 5),
    }


def setting(units: int, batch: int, steps: int, target: float, delta: float) -> dict[str, object]:
    most = units // batch
    bands = [b for b in (1, 2, 3, 5, 8, 10, 15, 20) if b <= most]
    rows = [row(name, b, units, batch, steps, target, delta) for name in ("cyclic", "poisson") for b in bands]
    return {"units": units, "batch": batch, "steps": steps, "epsilon": target, "delta": delta, "rows": rows}


def main() -> None:
    results = [setting(*arguments) for arguments in SETTINGS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for found in results:
        print(
            f"\n{found['units']} units, batch {found['batch']}, {found['steps']} steps, epsilon {found['epsilon']:g} "
            f"at delta {found['delta']:g}: rms of the sums' noise over clip (noise multiplier)"
        )
        for one in found["rows"]:  # type: ignore[attr-defined]
            text = f"{one['rms']:.4f} ({one['noise']:.3f})" if "rms" in one else "no noise keeps it"
            print(f"  {one['sampler']:8} bands {one['bands']:3}  {text}")


if __name__ == "__main__":
    main()
