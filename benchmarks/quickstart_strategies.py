"""The quickstart (MiniLM, ICD-10, four hospitals, epsilon 8 for each patient) under several strategies.

    python benchmarks/quickstart_strategies.py                    all, in an hour on one core; goes on where it stopped
    python benchmarks/quickstart_strategies.py --only fedit,ffa    these alone
    python benchmarks/quickstart_strategies.py --table             prints and draws what is there

Learning rates were not searched: all take the scenario's, which was found for fedit under privacy. flexlora takes a
third of it: its A has rows of length 1, ours begin at 1/sqrt(3), and a step of B moves dW by |A| squared. Noise comes
from the operating system, so a repetition differs. Held-out phrases are counted exactly, which a simulation may.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import load_scenario

RESULTS = Path(__file__).parent / "results" / "quickstart_strategies.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "quickstart-strategies.svg"
EXACT = ["evaluate.release=exact_not_private"]
MIXED = (
    "["
    + ", ".join(
        f'{{name="{name}", rank={rank}}}' for name, rank in (("north", 2), ("east", 4), ("south", 8), ("west", 16))
    )
    + "]"
)
#: Name in the table: what is set beside the scenario.
ENTRIES: dict[str, list[str]] = {
    "fed-sb": ["strategy=fed-sb", "method.name=lora-sb", "method.rank=16", "method.alpha=32"],
    "ffa": ["strategy=ffa"],
    "rolora": ["strategy=rolora"],
    "fedex": ["strategy=fedex"],
    "flexlora 2/4/8/16": [
        "strategy=flexlora",
        "method.rank=16",
        "method.alpha=16",
        f"data.sites={MIXED}",
        "train.lr=0.4",
    ],
    "fedsa": ["strategy=fedsa"],
    "fedit": ["strategy=fedit"],
}


def run(overrides: list[str]) -> dict[str, Any]:
    config = load_scenario("hospitals-icd10", [*overrides, *EXACT])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        done = simulate(config, Path(scratch) / "run")
        lines = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy_by_round": [round(x["accuracy"], 4) for x in lines if x["kind"] == "evaluate"],
        "epsilon": max(site["epsilon"] for site in done["sites"].values()),
        "noise": {name: round(site["privacy"]["noise_multiplier"], 3) for name, site in done["sites"].items()},
        "bytes_up_round": done["bytes_up_round"],
        "bytes_down_round": done["bytes_down_round"],
        "lr": config.train.lr,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(results: dict[str, Any]) -> None:
    print(f"{'':20}{'rate':>7}{'accuracy by round':>44}{'KiB up':>9}{'KiB down':>10}{'epsilon':>9}")
    for name, entry in results.items():
        for one in entry["runs"]:
            shown = "  ".join(f"{100 * a:.1f}" for a in one["accuracy_by_round"])
            print(
                f"{name:20}{one['lr']:>7g}{shown:>44}{one['bytes_up_round'] / 1024:>9.0f}"
                f"{one['bytes_down_round'] / 1024:>10.0f}{one['epsilon']:>9.2f}"
            )


def draw(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for name, entry in results.items():
        for number, one in enumerate(entry["runs"]):
            lines = axis.plot([100 * a for a in one["accuracy_by_round"]], marker="o", ms=4, alpha=0.9)
            lines[0].set_color(f"C{list(results).index(name)}")
            lines[0].set_label(name if number == 0 else None)
    axis.set_xlabel("round")
    axis.set_ylabel("accuracy at the hospitals, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of the table, separated by commas")
    parser.add_argument("--table", action="store_true", help="run nothing")
    settings = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"table": {}}
    wanted = settings.only.split(",") if settings.only else list(ENTRIES)

    def keep() -> None:
        before["conditions"] = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        before["what"] = __doc__.splitlines()[0]
        RESULTS.write_text(json.dumps(before, indent=1) + "\n")

    for name in [] if settings.table else wanted:
        if name in before["table"]:
            continue
        before["table"][name] = {"overrides": ENTRIES[name], "runs": [run(ENTRIES[name])]}
        print(name, before["table"][name]["runs"], flush=True)
        keep()
    results = {name: before["table"][name] for name in ENTRIES if name in before["table"]}
    table(results)
    draw(results)


if __name__ == "__main__":
    main()
