"""Our epsilon beside the published rows, an independent computation, and the accountants that cannot be chosen.

    python benchmarks/accounting.py      writes benchmarks/results/accounting.json and prints a table

The published rows are those of PRIVACY.md, section 4 (dp-accounting 0.6 at a grid of 1e-3; Opacus 1.6). Deterministic.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from opacus.accountants.analysis import gdp

from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.losses import check_epsilon

RESULTS = Path(__file__).parent / "results" / "accounting.json"
COLUMNS = [
    # event, delta, published: PLD, PLD replace-one, RDP
    (Event(1.0, 0.01, 1000), 1e-5, 1.829, 2.844, 2.101),
    (Event(0.8, 0.1, 500), 1e-5, 25.924, 40.75, 28.63),
    (Event(1.2, 0.05, 200), 1e-5, 3.383, 5.489, 3.778),
    (Event(0.7, 0.02, 2000), 1e-6, 14.472, 20.00, 15.89),
]


def column(event: Event, delta: float, published: float, replaced: float, renyi: float) -> dict[str, object]:
    began = time.perf_counter()
    pld = epsilon((event,), delta)
    seconds = time.perf_counter() - began
    checks = {name: check_epsilon((event,), delta, name) for name in ("add_remove", "replace_one")}
    rows = {
        "pld": (pld, published),
        "pld, replace_one": (epsilon((event,), delta, "replace_one"), replaced),
        "rdp": (epsilon((event,), delta, accountant="rdp"), renyi),
    }
    return {
        "noise": event.noise_multiplier,
        "rate": event.sampling_rate,
        "steps": event.steps,
        "delta": delta,
        "rows": {
            name: {"epsilon": round(got, 4), "published": told, "off_by_percent": round(100 * (got / told - 1), 3)}
            for name, (got, told) in rows.items()
        },
        "independent": {
            name: {"estimate": round(found.estimate, 4), "least": round(found.least, 4)}
            for name, found in checks.items()
        },
        "rdp, replace_one": round(epsilon((event,), delta, "replace_one", "rdp"), 4),
        "refused: gdp": round(
            float(
                gdp.compute_eps_poisson(
                    steps=event.steps,
                    noise_multiplier=event.noise_multiplier,
                    sample_rate=event.sampling_rate,
                    delta=delta,
                )
            ),
            4,
        ),
        "seconds_for_pld": round(seconds, 3),
    }


def main() -> None:
    columns = [column(*arguments) for arguments in COLUMNS]
    naive = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    formula = {
        "claimed": 10.0,
        "noise": round(naive, 4),
        "epsilon": round(epsilon((Event(naive, 1.0, 1),), 1e-5), 3),
    }
    results = {"columns": columns, "refused: sqrt(2 ln(1.25/delta))/epsilon at epsilon 10": formula}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    width = 26
    titles = [f"q={c['rate']} z={c['noise']} T={c['steps']} ({c['delta']:g})" for c in columns]
    print("epsilon (delta)".ljust(width), *(title.rjust(width) for title in titles))
    for name in columns[0]["rows"]:  # type: ignore[attr-defined]
        cells = [c["rows"][name] for c in columns]  # type: ignore[index]
        texts = [f"{x['epsilon']:.3f} ({x['published']:g}, {x['off_by_percent']:+.2f} %)" for x in cells]
        print(name.ljust(width), *(text.rjust(width) for text in texts))
    for name in ("add_remove", "replace_one"):
        texts = [f"{c['independent'][name]['estimate']:.3f}" for c in columns]  # type: ignore[index]
        print(f"own FFT, {name}".ljust(width), *(text.rjust(width) for text in texts))
    for name in ("rdp, replace_one", "refused: gdp"):
        print(name.ljust(width), *(f"{c[name]:.3f}".rjust(width) for c in columns))
    print(f"the Gaussian formula's noise for epsilon 10 spends {formula['epsilon']}")


if __name__ == "__main__":
    main()
