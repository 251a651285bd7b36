"""A sweep of six short runs, finished once, that tests look at or copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.simulations.execution import Execution
from fedgraft.simulations.sweep.grid import Axis
from fedgraft.simulations.sweep.plan import Sweep, make
from fedgraft.simulations.sweep.run import Outcome, run_sweep

#: Runs of a third of a second each: two rounds of one step.
SHORT = {"rounds": 2, "train.local_steps": 1, "seed": 5}
ONE = Execution(threads=1)


@pytest.fixture(scope="session")
def short(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``short(**changes)``: the file of a short configuration."""
    folder = tmp_path_factory.mktemp("short")

    def write(**changes: Any) -> str:
        path = folder / f"tiny-{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(tiny_federation.values(**{**SHORT, **changes})), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def planned(short: Callable[..., str]) -> Sweep:
    """Two strategies and two seeds, and no training beside them."""
    return make(short(), [Axis("strategy", ("fedit", "ffa"))], seeds=2, baselines=("none",))


@pytest.fixture(scope="session")
def done(planned: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The sweep ``planned``, finished."""
    return run_sweep(planned, tmp_path_factory.mktemp("sweep") / "done", parallel=1, execution=ONE)


@pytest.fixture(scope="session")
def traces() -> Callable[[Path], dict[str, tuple[str, int, bytes]]]:
    """Of every run in a sweep: its id, when its run.json was written, and its metrics."""

    def look(folder: Path) -> dict[str, tuple[str, int, bytes]]:
        return {
            path.parent.name: (
                json.loads(path.read_text())["run"],
                path.stat().st_mtime_ns,
                (path.parent / "metrics.jsonl").read_bytes(),
            )
            for path in folder.glob("runs/*/run.json")
            if json.loads(path.read_text())["status"] == "finished"
        }

    return look
