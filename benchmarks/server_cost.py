"""What aggregation costs the server: many sites of a million parameters, streamed, in seconds and in memory.

    python benchmarks/server_cost.py                       every strategy whose result is a sum, and the FlexLoRA kind
    python benchmarks/server_cost.py --sites 100 --only fedit flexlora

Updates are made one at a time and dropped; LoRA of rank 8 on 81 layers of 768 x 768 and a head. Each is given to the
strategy and to a plain running sum in float64, by turns first; blocks of a tenth of the sites are timed, and the median
block of each counts, with the close of the round. Memory is traced in a run of its own: the peak beside the update that
is being added, in sizes of the adapter, or of what a site sends where that is more. A run of 1,000 sites writes
benchmarks/results/server_cost.json; with --only, its other lines are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator, strategies

RESULTS = Path(__file__).parent / "results" / "server_cost.json"
LAYERS, WIDTH, RANK = 81, 768, 8
#: Options without which a strategy has no sensible size here: the sum of 1,000 sites' ranks would be all of dW.
OPTIONS: dict[str, dict[str, Any]] = {"fedask": {"q": 64}, "frlora": {"factors": "initial"}}
#: What a rule holds by its equation beside sums, so that the limit on memory is not for it.
NEEDS = {
    "fedask": "Q, as large as what a site sends",
    "frlora": "the change of the base weights, of rank 2 r more each round, in float64",
    "flexlora": "the product: a stack of up to rank 40 r, then a sketch",
    "hlora": "the product: a stack of up to rank 40 r, then a sketch",
    "raflora": "the product: a stack of up to rank 40 r, then a sketch",
}
FLEXLORA_TYPE = ("flexlora", "hlora", "raflora")
LIMITS = {"linear sum": 2.0, "flexlora": 10.0}
MEMORY_LIMIT = 3.0


def lora() -> AdapterSpec:
    tensors, pairs = [], []
    for layer in range(LAYERS):
        a, b = (f"base_model.model.layer.{layer}.query.lora_{side}.default.weight" for side in "AB")
        tensors += [
            TensorSpec(a, (RANK, WIDTH), role="lora_A", averaging="product"),
            TensorSpec(b, (WIDTH, RANK), role="lora_B", averaging="product"),
        ]
        pairs.append(LowRankPair(a, b, 2.0))
    tensors.append(TensorSpec("base_model.model.classifier.modules_to_save.default.weight", (6, WIDTH), role="head"))
    tensors.append(TensorSpec("base_model.model.encoder.LayerNorm.weight", (WIDTH,), role="norm", averaging="linear"))
    return AdapterSpec("lora", tuple(tensors), tuple(pairs), rank=RANK, alpha=2.0 * RANK)


def widened(own: AdapterSpec) -> AdapterSpec:
    """The specification that a strategy of its own method is tested with, at the width here and a million numbers."""
    small = own.rank or 1
    trained = sum(t.size for t in own.tensors if t.policy == "share" and t.size >= small**2)
    rank = int(small * (1_000_000 / trained) ** 0.5)
    sizes = {small: rank, 2 * small: 2 * rank, 2: 2}
    tensors = tuple(replace(t, shape=tuple(sizes.get(d, WIDTH) for d in t.shape)) for t in own.tensors)
    return replace(own, tensors=tensors, rank=rank, alpha=2.0 * rank)


def initial(spec: AdapterSpec) -> AdapterState:
    random = np.random.default_rng(0)
    draw = {t.name: random.standard_normal(t.shape, dtype=np.float32) * np.float32(0.02) for t in spec.tensors}
    return AdapterState(spec, draw)


class Stream:
    """Updates of equal description and changing numbers, one at a time."""

    def __init__(self, state: AdapterState, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.state, self.names = state, state.spec.select("share")
        self._noise = [
            {name: random.standard_normal(state[name].shape, dtype=np.float32) for name in self.names} for _ in range(3)
        ]

    @property
    def bytes(self) -> int:
        return sum(self.state[name].nbytes for name in self.names)

    def updates(self, sites: int) -> Iterator[Update]:
        for number in range(sites):
            yield self._update(number)  # nothing of it is held here while the next is made

    def _update(self, number: int) -> Update:
        size = np.float32(0.01 * (1 + number % 7))
        tensors = {}
        for name, noise in self._noise[number % len(self._noise)].items():
            tensors[name] = self.state[name] + size * noise
            tensors[name].flags.writeable = False
        state = AdapterState(self.state.spec, tensors, names=self.names)
        weight = float(1 + number % 50)
        return Update(f"site-{number:04d}", state, weight, {"records": weight, "steps": 3.0, "loss": 1.0})


class PlainSum:
    """total += w * theta, in float64: the least that any of them must do."""

    def __init__(self) -> None:
        self.total: dict[str, np.ndarray] = {}
        self.weight = 0.0

    def add(self, update: Update) -> None:
        for name, array in update.state.items():
            if name not in self.total:
                self.total[name] = np.zeros(array.shape)
            self.total[name] += update.weight * array.astype(np.float64)
        self.weight += update.weight

    def result(self) -> dict[str, np.ndarray]:
        return {name: (total / self.weight).astype(np.float32) for name, total in self.total.items()}


def begun(name: str, sites: int) -> tuple[Aggregator, AdapterState]:
    rule = create_aggregator(name, {**getattr(strategies()[name], "contract_options", {}), **OPTIONS.get(name, {})})
    rule.ranks = {f"site-{number:04d}": RANK for number in range(sites)}
    own = getattr(strategies()[name], "contract_spec", None)
    state = rule.prepare(initial(widened(own()) if own is not None else lora()))
    rule.round = 1
    return rule, state


def passes(rule: Aggregator, state: AdapterState) -> Iterator[tuple[str, AdapterState]]:
    """What the sites are asked: once, or twice."""
    yield "add", rule.for_site(state, "site-0000")
    if rule.capabilities.two_passes:
        second = rule.second_pass()
        if second is None:
            raise SystemExit(f"{rule.name} declares two passes and has one")
        yield "add_refined", rule.for_site(second, "site-0000")


def seconds(name: str, sites: int) -> dict[str, Any]:
    """Seconds of the strategy and of a plain sum over the same updates."""
    rule, state = begun(name, sites)
    rule.start_round(state)
    mine, plain, parameters = 0.0, 0.0, 0
    asked = passes(rule, state)
    while True:
        at = time.perf_counter()
        one = next(asked, None)
        mine += time.perf_counter() - at
        if one is None:
            break
        method, received = one
        stream, total = Stream(received, 1), PlainSum()
        parameters += stream.bytes // 4
        blocks: list[list[float]] = [[], []]
        size = max(1, sites // 10)
        for number, update in enumerate(stream.updates(sites)):
            if number % size == 0:
                for block in blocks:
                    block.append(0.0)
            steps = [(0, getattr(rule, method)), (1, total.add)]
            for who, step in steps if number % 2 else steps[::-1]:
                at = time.perf_counter()
                step(update)
                blocks[who][-1] += time.perf_counter() - at
        mine += statistics.median(blocks[0]) * sites / size
        plain += statistics.median(blocks[1]) * sites / size
        at = time.perf_counter()
        total.result()
        plain += time.perf_counter() - at
    at = time.perf_counter()
    rule.result()
    close = time.perf_counter() - at
    mine += close
    return {"seconds": mine, "plain_seconds": plain, "ratio": mine / plain, "close": close, "parameters": parameters}


def memory(name: str, sites: int) -> dict[str, Any]:
    """The peak beside the update in hand, in sizes of the adapter or of what a site sends, whichever is more."""
    rule, state = begun(name, sites)
    streams: list[Stream] = []
    tracemalloc.start()
    most, size = 0, 4 * lora().parameters
    before = tracemalloc.get_traced_memory()[0]
    rule.start_round(state)
    for method, received in passes(rule, state):
        # The noise that updates are made of is the benchmark's own.
        held = tracemalloc.get_traced_memory()[0]
        streams.append(Stream(received, 1))
        before += tracemalloc.get_traced_memory()[0] - held
        size = max(size, streams[-1].bytes)
        tracemalloc.reset_peak()
        for update in streams[-1].updates(sites):
            getattr(rule, method)(update)
            del update
        most = max(most, tracemalloc.get_traced_memory()[1] - before - streams[-1].bytes)
        tracemalloc.reset_peak()
    result = rule.result()
    most = max(most, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return {"peak_states": most / size, "peak_mib": most / 2**20, "state_mib": size / 2**20, "tensors": len(result)}


def child(name: str, sites: int, what: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, "--what", what, "--sites", str(sites)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write(lines: dict[str, Any]) -> None:
    about = {
        "sites": 1000,
        "parameters": lora().parameters,
        "rank": RANK,
        "options": OPTIONS,
        "limits": {**LIMITS, "memory": MEMORY_LIMIT},
        "threads": 1,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    RESULTS.write_text(json.dumps({"about": about, "strategies": dict(sorted(lines.items()))}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("seconds", "memory"), default="seconds", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps((seconds if asked.what == "seconds" else memory)(asked.one, asked.sites)))
        return
    known = {n: c for n, c in strategies().items() if c.capabilities.linear_sum or n in FLEXLORA_TYPE}
    known = {n: c for n, c in known.items() if not asked.only or n in asked.only}
    before = json.loads(RESULTS.read_text())["strategies"] if asked.only and RESULTS.exists() else {}
    lines: dict[str, Any] = {}
    header = f"{'strategy':12s} {'kind':11s} {'seconds':>8s} {'plain':>7s} {'ratio':>6s} {'peak':>7s}"
    print(f"{header} (states beside the update)")
    for name in known:
        kind = "flexlora" if name in FLEXLORA_TYPE else "linear sum"
        line = {"kind": kind, **child(name, asked.sites, "seconds"), **child(name, asked.sites, "memory")}
        lines[name] = line
        if "failed" in line:
            print(f"{name:12s} {line['failed'][:120]}")
            continue
        line["seconds_hold"] = line["ratio"] <= LIMITS[kind]
        line["memory_holds"] = None if name in NEEDS else line["peak_states"] < MEMORY_LIMIT
        line["needs"] = NEEDS.get(name, "")
        wrong = "" if line["seconds_hold"] and line["memory_holds"] is not False else "  TOO MUCH"
        times = f"{line['seconds']:8.2f} {line['plain_seconds']:7.2f} {line['ratio']:6.2f}"
        print(f"{name:12s} {kind:11s} {times} {line['peak_states']:7.2f}{wrong}", flush=True)
        if asked.sites == 1000:
            write({**before, **lines})


if __name__ == "__main__":
    main()
