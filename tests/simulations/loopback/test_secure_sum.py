"""A secure sum among real sites: the in-process engine's adapter, also when a site is killed during a round."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fedgraft.core.config import RunConfig, load_config
from fedgraft.core.wire import no_answer
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control
from fedgraft.server.rundir import read_run
from fedgraft.simulations.loopback.running import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FIVE = ("east", "north", "south", "up", "west")
_PATIENCE = 500.0


@pytest.fixture
def config(tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path) -> RunConfig:
    """Two rounds of five sites, of which two may be lost; long enough to be killed in the middle of one."""
    sites = []
    for number, name in enumerate(FIVE):
        path = tinyfederation.write_csv(tmp_path / f"{name}.csv", list(tiny_federation.rows[number :: len(FIVE)]))
        sites.append({"name": name, "path": str(path)})
    changes = {
        **{"data.path": "", "data.sites": sites, "rounds": 2, "evaluate.every": 0, "train.local_steps": 120},
        **{"server.join_timeout": 300.0, "server.round_timeout": 400.0, "server.quorum": 3},
        **{"secure_sum.enabled": True, "secure_sum.threshold": 3},
    }
    (tmp_path / "job.json").write_text(tiny_federation.config(**changes).to_json())
    return load_config(tmp_path / "job.json")


def _log(loopback: Loopback, site: str) -> list[dict[str, Any]]:
    return audit_journal(loopback.site(site) / "state" / "audit.jsonl").entries()


@contextmanager
def _killed_in_its_second_training(loopback: Loopback, site: str) -> Iterator[list[float]]:
    """Kill all processes of ``site`` once it has sealed its shares in round 2."""
    killed: list[float] = []
    over = threading.Event()

    def watch() -> None:
        path = loopback.site(site) / "state" / "audit.jsonl"
        while not over.wait(0.05):
            text = path.read_text() if path.exists() else ""
            lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
            if any(line.get("kind") == "shares" and line.get("round") == 2 for line in lines):
                time.sleep(0.5)
                whole = psutil.Process(loopback.processes[site].pid)
                for process in [whole, *whole.children(recursive=True)]:
                    process.kill()
                killed.append(time.monotonic())
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_the_sum_of_real_sites_is_that_of_the_in_process_run_though_one_is_killed_in_the_middle_of_a_round(
    config: RunConfig, tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    loopback = Loopback(tmp_path / "dev", config)
    loopback.provision()
    for site in FIVE:
        policy = loopback.site(site) / "policy.toml"
        policy.write_text(policy.read_text() + "secure_sum = true\n")
    with loopback.running(print):
        kit, control = loopback.server, Control(loopback.server)
        _, number = jobs.submit(kit, control, config, "sum")
        with _killed_in_its_second_training(loopback, "north") as killed:
            jobs.require_completed(kit, control, "sum")
        said = "".join(control.logs(number, follow=True))
        fetched = jobs.fetch(kit, "sum", tmp_path / "fetched")
        control.close()
    assert killed, "north was at work when it was killed"
    run = read_run(fetched)
    first, second = tinyfederation.metrics(fetched, "train")
    assert first["missing"] == {} and first["secure_sum"]["sites"] == 5
    assert set(second["missing"]) == {"north"} and second["secure_sum"]["sites"] == 4
    assert "round 2: north is missing: " in said
    assert run["secure_sum"]["threshold"] == 3 and 0 < run["secure_sum"]["error"] < 1e-6

    # What left each site: numbers under masks, and of the update nothing else.
    for site in FIVE:
        left = [line for line in _log(loopback, site) if line["event"] == "left"]
        trained = [line for line in left if line["kind"] == "train"]
        assert [line["round"] for line in trained] == ([1] if site == "north" else [1, 2])
        for line in trained:
            assert line["masked"]["dtype"] == "uint64" and "tensors" not in line
            assert set(line["metrics"]) == {"steps"}
        revealed = [line["round"] for line in left if line["kind"] == "reveal"]
        assert revealed == ([1] if site == "north" else [1, 2])

    def lost(site: str, message: Message, answer: Any) -> Message:
        job = message.content["job"]
        kind = message.metadata.message_type
        if site == "north" and kind in ("train", "evaluate") and job["round"] == 2:
            return no_answer(message, "late", "lost by the test")
        return answer()

    told = tiny_federation.run(config, tmp_path / "simulated", lost)
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (fetched, tmp_path / "simulated")]
    one, two = (load_file(path) for path in weights)
    assert set(one) == set(two) and one
    largest = max(float(np.abs(array).max()) for array in two.values())
    apart = max(float(np.abs(one[key] - two[key]).max()) for key in one)
    assert apart <= told["secure_sum"]["error"] + 2**-22 * largest
