"""Every PEFT method on the quickstart's data with MiniLM: accuracy, bytes, time and memory, with and without privacy.

    python benchmarks/methods.py                     all that is missing; goes on where it stopped (hours on 2 cores)
    python benchmarks/methods.py --only lora,ia3     these alone
    python benchmarks/methods.py --again lora        these anew
    python benchmarks/methods.py --further           one learning rate more where the best is at an end of those tried
    python benchmarks/methods.py --table             prints and draws what is there

The quickstart's four hospitals with fewer steps, so that a run takes seconds: what is compared is methods, not what can
be reached. Each method has the same budget of tuning: three learning rates of AdamW (and one more for each
`--further`, where the best of them is at an end); its own defaults otherwise. The best is told, chosen by the same
held-out phrases for all. With privacy: epsilon 8 for each patient, noise from the operating system. Seconds are of a
site's step of 48 patients; memory is the most that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "methods.json"
#: What `fedgraft methods advise` goes by.
ADVICE = Path(__file__).parent.parent / "simulations" / "advice" / "measured.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "methods.svg"
MODES = {"none": ["privacy.enabled=false"], "epsilon 8": []}
RATES = (5e-3, 1.6e-2, 5e-2)
#: How far beyond the last rate the next one is, where that was the best; and the most rates of a method.
BEYOND, MOST = 3.2, 5
SMALL = [
    *("rounds=2", "train.local_steps=6", "train.batch_size=48", "data.test_per_class=30"),
    "task.max_length=12",
    *("train.optimizer=adamw", "train.momentum=0", "train.max_grad_norm=1.0", "evaluate.every=0"),
    *("evaluate.release=exact_not_private", "train.device=cpu", "strategy=fedit"),
]
#: Of those that move every weight.
OWN_RATES = dict.fromkeys(("full", "freeze-layers", "child-tuning-f"), (1e-4, 3e-4, 1e-3))
#: Of which three rates take over half an hour: the one that was best without privacy.
SLOW = {("diff-pruning", "epsilon 8"): (5e-3,)}
#: Beside a method's defaults: memory for those with a row for each weight, a rank that eight experts can share, and
#: which tokens train ([CLS] and [SEP]).
OWN: dict[str, list[str]] = {
    **{name: ["train.micro_batch=16"] for name in ("full", "child-tuning-f")},
    **{name: ["train.micro_batch=4"] for name in ("diff-pruning", "threshold-mask")},
    "moelora": ["method.rank=8"],
    "trainable-tokens": ["method.options.token_indices=[101, 102]"],
}
#: The methods that begin with trained adapters: of which method, and the seeds of the runs that train them.
EXPERTS = {"adapterfusion": ("lora", (8, 9)), "attempt": ("prompt", (8, 9)), "spot": ("prompt", (8,))}
KINDS = ("adapter", "prompt", "other additive", "partial", "low-rank", "other reparameterised", "hybrid", "whole")
_PATIENCE = 3600


def mask(name: str, folder: Path) -> list[str]:
    """The setting of a mask file for a method that takes one, made of 220 phrases: terminology is public."""
    from fedgraft.core.tasks import create_task
    from fedgraft.methods.importance import KEEP, mask_of, save_mask
    from fedgraft.simulations.scenario import load_scenario, site_data

    config = load_scenario("hospitals-icd10", SMALL)
    site = next(iter(site_data(config).values()))
    task = create_task(config.task)
    base = task.load(config.model, config.task, config.seed)
    texts, labels = list(site.train.inputs[:220]), list(map(int, site.train.labels[:220]))
    examples = task.encode(texts, labels, base.processor)
    save_mask(folder / "mask.safetensors", mask_of(name, base, task, examples, KEEP[name], lambda done, of: None))
    return [f"method.mask={folder / 'mask.safetensors'}"]


def experts(name: str, folder: Path) -> list[str]:
    """The setting of the adapters that a method begins with: of other federations on the same task, without privacy."""
    from fedgraft.simulations.run import simulate
    from fedgraft.simulations.scenario import load_scenario

    kind, seeds = EXPERTS[name]
    for seed in seeds:
        settings = [*SMALL, *MODES["none"], f"method.name={kind}", "train.lr=1.6e-2", f"seed={seed}"]
        simulate(load_scenario("hospitals-icd10", settings), folder / str(seed))
    return [f"method.experts={json.dumps([str(folder / str(seed) / 'adapter') for seed in seeds])}"]


def prepare(name: str, folder: Path) -> list[str]:
    """The settings of files that a method needs, made in ``folder``."""
    from fedgraft.methods.importance import KEEP

    return mask(name, folder) if name in KEEP else experts(name, folder) if name in EXPERTS else []


def further(entry: dict[str, Any]) -> float | None:
    """The rate to try beyond the best one where that is the last on a side; None where it is not, or all are spent."""
    rates = sorted(run["lr"] for run in entry.get("runs", ()))
    if "accuracy" not in entry or len(rates) >= MOST:
        return None
    beyond = {rates[0]: rates[0] / BEYOND, rates[-1]: rates[-1] * BEYOND}.get(entry["lr"])
    return None if beyond is None else float(f"{beyond:.2g}")


def merged(entry: dict[str, Any], more: dict[str, Any], rate: float) -> dict[str, Any]:
    """An entry with what came of a further ``rate``, which may have failed."""
    failed = {"lr": rate, "failed": more.get("refused", "")}
    runs = [*entry["runs"], *more.get("runs", [failed])]
    best = max((run for run in runs if "accuracy" in run), key=lambda run: run["accuracy"])
    return {**entry, **best, "peak_mib": max(entry["peak_mib"], more.get("peak_mib", 0)), "runs": runs}


def one(name: str, mode: str, rates: list[float], *prepared: str) -> dict[str, Any]:
    """A method at some learning rates in this process."""
    import torch

    from fedgraft.core.errors import UserError
    from fedgraft.methods import create_method
    from fedgraft.simulations.run import simulate
    from fedgraft.simulations.scenario import load_scenario

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    runs: list[dict[str, Any]] = []
    for rate in rates:
        config = load_scenario(
            "hospitals-icd10",
            [*SMALL, *MODES[mode], *OWN.get(name, ()), *prepared, f"method.name={name}", f"train.lr={rate}"],
        )
        with tempfile.TemporaryDirectory() as scratch:
            try:
                done = simulate(config, Path(scratch) / "run")
            except UserError as error:
                if runs or "diverged" in str(error):
                    runs.append({"lr": rate, "failed": str(error)})
                    continue
                return {"refused": str(error)}
            lines = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
        trained = [line["seconds"] for line in lines if line["kind"] == "train"]
        steps = config.train.local_steps * len(config.site_names)
        runs.append(
            {
                "lr": rate,
                "accuracy": round(done["accuracy"]["after"], 4),
                "seconds_a_step": round(sorted(trained)[len(trained) // 2] / steps, 4),
                "trainable": done["adapter"]["shared"],
                "parameters": done["model"]["parameters"],
                "bytes_up_round": done["bytes_up_round"],
            }
        )
    good = [run for run in runs if "accuracy" in run]
    if not good:
        return {"refused": runs[0]["failed"]}
    best = max(good, key=lambda run: run["accuracy"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**best, "peak_mib": round(peak / 1024), "kind": create_method(name).kind, "runs": runs}


def apart(name: str, mode: str, rates: tuple[float, ...]) -> dict[str, Any]:
    """:func:`one` in a process of its own, so that its memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = _told("--prepare", name, folder)
        if isinstance(prepared, list):
            found: dict[str, Any] = _told("--one", name, mode, json.dumps(rates), *prepared)
            return found
        return dict(prepared)


def _told(*arguments: str) -> Any:
    """What this file prints when it is called with ``arguments``, or why it does not."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"refused": f"not done within {_PATIENCE} s"}
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or ["it died"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        "method", "trains", "kB up", *(f"{m}: {x}" for m in MODES for x in ("acc", "s/step", "MiB")), box=SIMPLE_HEAD
    )
    order = sorted(results, key=lambda name: -max((r.get("accuracy", 0) for r in results[name].values()), default=0))
    for name in order:
        modes = results[name]
        known = next((entry for entry in modes.values() if "accuracy" in entry), None)
        cells = [name]
        if known is None:
            reason = next((entry["refused"] for entry in modes.values()), "")
            shown.add_row(name, "", "", reason[:40])
            continue
        cells += [f"{100 * known['trainable'] / known['parameters']:.2f} %", f"{known['bytes_up_round'] / 1000:.0f}"]
        for mode in MODES:
            entry = modes.get(mode, {})
            good = "accuracy" in entry
            cells += (
                [f"{100 * entry['accuracy']:.1f}", f"{entry['seconds_a_step']:.2f}", str(entry["peak_mib"])]
                if good
                else ["", "", ""]
            )
        shown.add_row(*cells)
    Console(width=110).print(shown)


def publish(results: dict[str, Any]) -> None:
    """Write what `fedgraft methods advise` goes by: accuracies, and the federation whose noise they had."""
    found = {}
    for name, modes in sorted(results.items()):
        good = {mode: entry["accuracy"] for mode, entry in modes.items() if "accuracy" in entry}
        # What begins with adapters of the same records starts where no other does.
        if good and name not in EXPERTS:
            trainable = next(entry["trainable"] for entry in modes.values() if "accuracy" in entry)
            found[name] = {**good, "trainable": trainable}
    # The size of a site is that of the mean one; its steps are those of a run.
    federation = {"sites": 4, "epsilon": 8.0, "uplink": 20.0, "memory": 8.0, "units": 1828, "batch": 48, "steps": 12}
    about = "the quickstart's data with MiniLM (benchmarks/methods.py)"
    ADVICE.write_text(json.dumps({"what": about, "federation": federation, "methods": found}, indent=1) + "\n")


def shown(results: dict[str, Any], mode: str) -> dict[str, Any]:
    """The entries of a mode that are drawn: trained adapters to begin with had no privacy."""
    found = {name: modes[mode] for name, modes in results.items() if "accuracy" in modes.get(mode, {})}
    return {name: entry for name, entry in found.items() if mode == "none" or name not in EXPERTS}


def draw(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedgraft"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(11, 15), sharex=True)
    for axis, mode in zip(axes, MODES, strict=True):
        found = shown(results, mode)
        for number, kind in enumerate(KINDS):
            own = [entry for entry in found.values() if entry["kind"] == kind]
            across, up = [entry["bytes_up_round"] / 1000 for entry in own], [100 * entry["accuracy"] for entry in own]
            axis.scatter(across, up, color=f"C{number}", s=18, label=kind)
        axis.set_xscale("log")
        axis.margins(x=0.08)
        axis.set_ylabel("accuracy at the hospitals, %")
        axis.set_title("without privacy" if mode == "none" else "epsilon 8 for each patient", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[1].set_xlabel("kB that a site sends a round")
    figure.tight_layout()
    figure.canvas.draw()
    for axis, mode in zip(axes, MODES, strict=True):
        label(axis, shown(results, mode))
    figure.savefig(PICTURE, metadata={"Date": None})


def label(axis: Any, found: dict[str, Any]) -> None:
    """Write each method's name beside its point, as near as it fits without lying on another name."""
    taken: list[Any] = []
    for name, entry in sorted(found.items(), key=lambda item: -item[1]["accuracy"]):
        for distance in range(3, 40, 3):
            for x, y, side in (
                (distance, -2, "left"),
                (-distance, -2, "right"),
                (0, distance, "center"),
                (0, -distance - 5, "center"),
            ):
                at = entry["bytes_up_round"] / 1000, 100 * entry["accuracy"]
                text = axis.annotate(name, at, xytext=(x, y), textcoords="offset points", fontsize=6, ha=side)
                box = text.get_window_extent()
                if not any(box.overlaps(other) for other in taken):
                    break
                text.remove()
            else:
                continue
            taken.append(box)
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--again", default="", help="methods to run anew, separated by commas")
    parser.add_argument("--further", action="store_true", help="try the next learning rate where the last was the best")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side; set OMP_NUM_THREADS to match")
    parser.add_argument("--until", default="", help="begin no run after this time of day, such as 17:05")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        print(json.dumps(prepare(given.prepare[0], Path(given.prepare[1]))))
        return
    if given.one:
        name, mode, rates, *prepared = given.one
        print(json.dumps(one(name, mode, json.loads(rates), *prepared)))
        return
    from fedgraft.methods import methods

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"table": {}}
    results: dict[str, Any] = kept["table"]
    for name in filter(None, given.again.split(",")):
        results.pop(name, None)
    wanted = [name for name in given.only.split(",") if name] or [m.name for m in methods() if not m.refused]
    asked = [(name, mode) for name in wanted for mode in MODES]
    missing = [(name, mode) for name, mode in asked if mode not in results.get(name, {})]

    def measure(what: tuple[str, str]) -> None:
        name, mode = what
        if given.until and time.strftime("%H:%M") >= given.until:
            return
        began = time.monotonic()
        known = results.get(name, {}).get(mode)
        if known is None:
            entry = apart(name, mode, SLOW.get((name, mode), OWN_RATES.get(name, RATES)))
        elif (rate := further(known)) is not None:
            entry = merged(known, apart(name, mode, (rate,)), rate)
        else:
            return
        with keeping:
            results.setdefault(name, {})[mode] = entry
            kept["what"], kept["settings"], kept["rates"] = __doc__.splitlines()[0], SMALL, RATES
            kept["conditions"] = f"{given.workers} at a time, threads each: {os.environ.get('OMP_NUM_THREADS', '2')}"
            RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        told = entry.get("accuracy", entry.get("refused"))
        print(f"{name:24}{mode:12}{told}   {time.monotonic() - began:.0f} s", flush=True)

    keeping = threading.Lock()
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(measure, [] if given.table else missing))
        if given.further:
            list(pool.map(measure, asked))
    table(results)
    draw(results)
    publish(results)


if __name__ == "__main__":
    main()
