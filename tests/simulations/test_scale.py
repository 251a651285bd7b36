"""Memory and files do not grow with the number of sites."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.progress import Watch
from fedgraft.simulations.run import simulate

RECORDS = 3600
#: What a simulated site may leave behind in memory, in bytes: its name, its node, its place in the sums of the run.
EACH = 10_000


class Counting(Watch):
    """The open files of this process, at most."""

    def __init__(self) -> None:
        self.files = 0

    def site_finished(self, kind: str, site: str) -> None:
        self.files = max(self.files, sum(1 for _ in Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str], tinyfederation: Any
) -> Callable[[int, bool], RunConfig]:
    rows = [
        {"text": f"{('heart', 'lung', 'liver')[number % 3]} zq{number}", "label": f"class-{number % 3}"}
        for number in range(RECORDS)
    ]
    table = tinyfederation.write_csv(tmp_path_factory.mktemp("many") / "records.csv", rows)

    def config(sites: int, private: bool) -> RunConfig:
        values = {
            "rounds": 1,
            "model": tiny_model("bert"),
            "method": {"rank": 2},
            "task": {"labels": [f"class-{number}" for number in range(3)], "max_length": 8},
            "train": {"local_steps": 1, "batch_size": 2, "device": "cpu"},
            "privacy": {"enabled": private, "delta": 1e-4, "accountant": "rdp"},
            "evaluate": {"every": 0, "release": "exact_not_private"},
            "data": {"path": str(table), "partition": "iid", "test_fraction": 0.4},
        }
        values["data"]["sites"] = [f"site-{number:04}" for number in range(sites)]
        return parse_config(values)

    return config


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_a_site_leaves_next_to_nothing_behind(
    federation: Callable[[int, bool], RunConfig], tmp_path: Path, private: bool
) -> None:
    peaks, files = {}, {}
    for sites in (20, 60, 240):  # the first one warms up
        watch = Counting()
        gc.collect()
        tracemalloc.start()
        run = simulate(federation(sites, private), tmp_path / str(sites), watch=watch)
        peaks[sites], files[sites] = tracemalloc.get_traced_memory()[1], watch.files
        tracemalloc.stop()
        assert run["status"] == "finished" and len(run["sites"]) == sites
    assert (peaks[240] - peaks[60]) / 180 < EACH
    assert files[240] <= files[60] + 2
