"""Kill -9 at random moments of a process that spends privacy budget, and what the site's ledger says afterwards.

    python benchmarks/kill.py [--loop N] [--federation N] [--seed S]     writes benchmarks/results/kill.json

Two processes are killed. One does nothing but reserve, pretend to train, release (a file, flushed to the disk) and
settle, so that most moments fall into the ledger's own work. The other is a whole tiny federation with noised
evaluations, which is resumed after each kill until it has finished. After every kill:

- each line of each ledger carries its own hash and that of the line before, but for a last line that was cut off;
- every update that was released is covered by a line of the ledger, and in a federation stands in the audit log;
- the epsilon that the ledger gives after the restart is that of all its events, read anew from the lines by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting import pld

from fedgraft.core.config import RunConfig
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.ledger import Ledger

RESULTS = Path(__file__).parent / "results" / "kill.json"
DATA = hashlib.sha256(b"made-up data").hexdigest()
DELTA = 1e-5
EVENTS = (Event(2.0, 0.1, 6), Event(4.0, 0.05, 3))
#: Forked from a process that holds the libraries already: a fresh one takes seconds to import them.
_PROCESSES = multiprocessing.get_context("forkserver")
_PRELOAD = ["fedgraft.simulations.run", "fedgraft.simulations.app", "transformers.models.bert.modeling_bert"]
_CHILD = """
import importlib.util
spec = importlib.util.spec_from_file_location("kill", FILE)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, FUNCTION)(**ARGUMENTS)
"""


class WrongError(Exception):
    """What must never be seen was seen."""


# What is killed


def loop(folder: str, seed: int) -> None:
    """Reserve, train (in name), release, settle, without end."""
    place, draw = Path(folder), random.Random(seed)
    ledger = Ledger(place / "ledgers", DATA, dataset="made-up", unit="record")
    (place / "released").mkdir(exist_ok=True)
    number = 0
    while True:
        number += 1
        event, part = draw.choice(EVENTS), draw.choice(("train", "held-out"))
        reserved = ledger.reserve(event, part=part, split="s", run=f"run-{seed}", round=number)
        (place / "begun").touch()
        time.sleep(draw.random() * 3e-4)
        failed = draw.random() < 0.2
        taken = draw.randrange(event.steps) if failed else event.steps
        if not failed:
            told = {"line": reserved.line, "steps": taken, "part": part}
            _release(place / "released" / f"{time.time_ns()}.json", told)
        ledger.settle(reserved, taken, "failed" if failed else "released")


def federation(config: str, output: str, released: str, mark: str) -> None:
    """A simulated run, begun or gone on with; each answer of a site is kept as it leaves."""
    import torch

    from fedgraft.core.config import config_from_json
    from fedgraft.core.wire import decode_answer
    from fedgraft.simulations import run as runs
    from fedgraft.simulations.engines.inprocess import InProcessGrid

    torch.set_num_threads(1)
    answer = InProcessGrid._answer

    def watched(grid: InProcessGrid, message: Any) -> Any:
        if message.metadata.message_type in ("train", "evaluate"):
            Path(mark).touch()
        reply = answer(grid, message)
        kind = {"train": "train", "evaluate": "evaluate"}.get(message.metadata.message_type, "hello")
        told = decode_answer(reply.content, kind, "a site")  # type: ignore[arg-type]
        if told.privacy is not None and not told.error:
            content = {"site": told.site, "kind": kind, "line": told.privacy.ledger, "steps": told.privacy.steps}
            name = f"{time.time_ns()}-{told.site}-{kind}-{told.round}.json"
            _release(Path(released) / name, {**content, "epsilon": told.privacy.epsilon})
        return reply

    InProcessGrid._answer = watched  # type: ignore[method-assign]
    if (Path(output) / "run.json").exists():
        runs.resume(Path(output))
    else:
        runs.simulate(config_from_json(config), Path(output))


def _release(path: Path, content: dict[str, Any]) -> None:
    """What others have: there at once or not at all, and on the disk."""
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# Killing


def killed(function: str, arguments: dict[str, Any], mark: Path, wait: float) -> bool:
    """Run ``function`` in a process of its own, killed ``wait`` seconds after ``mark``; False where it had ended."""
    mark.unlink(missing_ok=True)
    given = {"__name__": "child", "FILE": __file__, "FUNCTION": function, "ARGUMENTS": arguments}
    process = _PROCESSES.Process(target=exec, args=(_CHILD, given), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not mark.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(1e-3)
    process.join(wait)
    process.kill()
    process.join(60)
    if process.exitcode not in (0, -signal.SIGKILL):
        raise WrongError(f"{function} ended by itself with {process.exitcode}")
    return process.exitcode == -signal.SIGKILL


# Looking, by other means than the ledger's own


def chained(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal, each hash computed anew; a last line without its end may be torn."""
    *whole, tail = path.read_bytes().split(b"\n")
    entries, before = [], "0" * 64
    for number, line in enumerate((*whole, tail), 1):
        try:
            entry = json.loads(line)
            content = json.dumps({key: value for key, value in entry.items() if key != "sha256"}, sort_keys=True)
            good = entry["before"] == before and entry["sha256"] == hashlib.sha256(content.encode()).hexdigest()
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            if number <= len(whole):
                raise WrongError(f"{path}: line {number} is damaged")
            break
        entries.append(entry)
        before = entry["sha256"]
    return entries


def paid(lines: list[dict[str, Any]], part: str, split: str) -> list[Event]:
    """What a unit in ``part`` of ``split`` paid: each reservation, less the steps that its settlement gives back."""
    taken = {line["id"]: line["steps"] for line in lines if line["kind"] == "settle"}
    events = []
    for line in lines:
        if line["kind"] == "reserve" and not (line["split"] == split and line["part"] != part):
            for values in line["events"]:
                steps = taken.get(line["id"], values["steps"]) if line["independent"] else values["steps"]
                events += [Event.from_dict({**values, "steps": steps})] if steps else []
    return events


def plain_epsilon(events: list[Event], delta: float) -> float:
    """By the library's accountant alone."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    total: Counter[tuple[float, float]] = Counter()
    for event in events:
        total[event.noise_multiplier, event.sampling_rate] += event.steps
    for (noise, rate), steps in sorted(total.items()):
        step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise)
        if rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(rate, step)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def require_right(folder: Path, released: list[dict[str, Any]], delta: float) -> dict[str, Any]:
    """Check a site's ledgers against what it released. Raises :class:`WrongError`."""
    files = sorted((folder / "ledgers").glob("*.jsonl")) if (folder / "ledgers").exists() else []
    lines = [line for file in files for line in chained(file)]
    reserved = [line for line in lines if line["kind"] == "reserve"]
    settled = {line["id"]: line["steps"] for line in lines if line["kind"] == "settle"}
    ledger = Ledger(folder / "ledgers")
    if [entry.id for entry in ledger.entries()] != [line["id"] for line in reserved]:
        raise WrongError(f"{folder}: the ledger does not read what stands there")
    split = reserved[-1]["split"] if reserved else ""
    largest = plain = 0.0
    for part in {line["part"] for line in reserved}:
        events = paid(lines, part, split)
        if sorted(events) != sorted(ledger.spent(part, split)):
            raise WrongError(f"{folder}: the ledger counts other events than its lines say")
        largest = max(largest, epsilon(tuple(events), delta))
        plain = max(plain, plain_epsilon(events, delta) if events else 0.0)
    if ledger.total(delta, split) != largest or abs(largest - plain) > 1e-3 * plain:
        raise WrongError(f"{folder}: epsilon {ledger.total(delta, split)} is not {largest} (plainly {plain})")
    by_hash = {line["sha256"]: line for line in lines}
    for update in released:
        if update["line"] not in by_hash:
            raise WrongError(f"{folder}: an update was released that no line covers: {update}")
    out = {by_hash[update["line"]]["id"] for update in released}
    state = "between"
    if any(file.stat().st_size and not file.read_bytes().endswith(b"\n") for file in files):
        state = "in a write"
    elif reserved and reserved[-1]["id"] not in settled:
        state = "released, not settled" if reserved[-1]["id"] in out else "reserved, not released"
    return {"entries": len(reserved), "epsilon": largest, "split": split, "state": state, "lines": lines}


def _released(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def kill_loop(times: int, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Kill :func:`loop` ``times`` times, always over the same ledger."""
    _PROCESSES.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    states: Counter[str] = Counter()
    seen: dict[str, Any] = {}
    for number in range(1, times + 1):
        arguments = {"folder": str(folder), "seed": draw.randrange(2**31)}
        if not killed("loop", arguments, folder / "begun", draw.uniform(0, 0.03)):
            raise WrongError("the loop ended by itself")
        released = _released(folder / "released")
        seen = require_right(folder, released, DELTA)
        for update in released:
            (line,) = (line for line in seen["lines"] if line["sha256"] == update["line"])
            said = [
                other["steps"] for other in seen["lines"] if other["kind"] == "settle" and other["id"] == line["id"]
            ]
            if line["part"] != update["part"] or (said or [line["steps"]])[0] < update["steps"]:
                raise WrongError(f"{folder}: {update} is more than {line} with {said} covers")
        states[seen["state"]] += 1
        print(
            f"loop, kill {number}: {seen['entries']} entries, epsilon {seen['epsilon']:.3f}, {seen['state']}",
            flush=True,
        )
    totals = {"entries": seen["entries"], "released": len(released), "epsilon": round(seen["epsilon"], 4)}
    return {"kills": times, "found": dict(sorted(states.items())), **totals}


def kill_federation(times: int, folder: Path, config: RunConfig, draw: random.Random) -> dict[str, Any]:
    """Kill :func:`federation` ``times`` times, go on with it after each, and let the last run come to its end."""
    _PROCESSES.set_forkserver_preload(_PRELOAD)
    kills, runs, answers = 0, [], 0
    while kills < times or runs[-1]["status"] != "finished":
        if not runs or runs[-1]["status"] == "finished":
            runs.append({"status": "", "kills": 0})
        output, released = folder / f"run-{len(runs)}", folder / f"released-{len(runs)}"
        released.mkdir(parents=True, exist_ok=True)
        mark = folder / "begun"
        arguments = {"config": config.to_json(), "output": str(output), "released": str(released), "mark": str(mark)}
        # Once it was killed often enough it is left alone.
        wait = draw.uniform(0, 2.5) if kills < times else 120.0
        died = killed("federation", arguments, mark, wait)
        kills += died
        runs[-1]["kills"] += died
        if (output / "run.json").exists():
            runs[-1]["status"] = json.loads((output / "run.json").read_text(encoding="utf-8"))["status"]
        out = _released(released)
        _require_right_run(output, out, config.privacy.delta)
        answers += len(out) if runs[-1]["status"] == "finished" else 0
        print(f"federation, kill {kills}: run {len(runs)} {runs[-1]['status']}, {len(out)} answers out", flush=True)
    return {"kills": kills, "runs": len(runs), "finished": [run["status"] for run in runs].count("finished")} | {
        "kills_by_run": [run["kills"] for run in runs],
        "answers": answers,
    }


def _require_right_run(output: Path, released: list[dict[str, Any]], delta: float) -> None:
    for site in sorted((output / "sites").iterdir()) if (output / "sites").exists() else []:
        own = [update for update in released if update["site"] == site.name]
        seen = require_right(site, own, delta)
        steps = Ledger(site / "ledgers").steps_spent("train", seen["split"])
        logged = {(entry.get("privacy") or {}).get("ledger") for entry in chained(site / "audit.jsonl")}
        for update in own:
            if update["epsilon"] > seen["epsilon"] * (1 + 1e-9) or update["steps"] > steps:
                raise WrongError(f"{site}: an answer told more than its ledger holds: {update}")
            if update["line"] not in logged:
                raise WrongError(f"{site}: an answer left that the audit log does not know: {update}")


def tiny_config(folder: Path) -> RunConfig:
    """Three sites, a two-layer BERT, patients of one record, noised evaluations."""
    from overhead import tiny_config, tiny_data, tiny_model

    tiny_model(folder / "model", 32)
    tiny_data(folder / "data.csv", 900)
    privacy = {"enabled": True, "epsilon": 100.0, "delta": DELTA, "noise_multiplier": 1.0}
    train = {"local_steps": 4, "batch_size": 16, "lr": 0.05}
    return tiny_config(folder, 3, rounds=12, privacy=privacy, evaluate={"every": 1}, train=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", type=int, default=75)
    parser.add_argument("--federation", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        looped = kill_loop(given.loop, folder / "loop", draw)
        federated = kill_federation(given.federation, folder / "federation", tiny_config(folder), draw)
    found = {
        "kills": looped["kills"] + federated["kills"],
        "wrong": 0,  # the first thing that is wrong ends this program
        "loop": looped,
        "federation": federated,
        "seed": given.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
