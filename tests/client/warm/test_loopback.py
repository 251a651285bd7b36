"""Three sites with their workers, each with processes, folder and data of its own, over a real SuperLink."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from fedgraft.client.policy import unrestricted
from fedgraft.simulations.run import simulate

pytestmark = pytest.mark.slow
SITES = ("east", "north", "south")
_PATIENCE = 400.0


@pytest.fixture(scope="module")
def deployment() -> ModuleType:
    """The harness that the benchmark measures with."""
    path = Path(__file__).parents[3] / "benchmarks" / "deployment.py"
    spec = importlib.util.spec_from_file_location("deployment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_federation: Any, tinyfederation: ModuleType
) -> dict[str, Path]:
    """Each site's folder: a third of the records, and a policy that lets everything out."""
    place = tmp_path_factory.mktemp("sites")
    found = {}
    for number, site in enumerate(SITES):
        folder = place / site
        folder.mkdir()
        tinyfederation.write_csv(folder / "records.csv", list(tiny_federation.rows[number::3]))
        policy = unrestricted().text.replace('"the scenario\'s"', '"records.csv"')
        (folder / "policy.toml").write_text(policy)
        found[site] = folder
    return found


@pytest.fixture(scope="module")
def loopback(
    deployment: ModuleType, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    with deployment.Loopback(tmp_path_factory.mktemp("loopback") / "processes", folders, "warm") as running:
        yield running


def audit_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def answerers(loopback: Any, site: str) -> list[psutil.Process]:
    return psutil.Process(loopback.processes[f"{site}-worker"].pid).children()


def final(output: Path) -> dict[str, Any]:
    (path,) = (output / "adapter").glob("*.safetensors")
    return load_file(path)


def config_of(tiny_federation: Any, folders: dict[str, Path], **changes: Any) -> Any:
    sites = [{"name": site, "path": str(folder / "records.csv")} for site, folder in folders.items()]
    return tiny_federation.config(**{"data.sites": sites, "data.path": "", "server.join_timeout": 120.0, **changes})


def test_the_adapter_is_that_of_the_simulation_also_when_an_answerer_dies_on_the_way(
    loopback: Any, deployment: ModuleType, tiny_federation: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_federation, folders, **{"train.local_steps": 60})
    simulate(config, tmp_path / "simulated")
    job = deployment.deployed_config(config, tmp_path / "job.toml")
    loopback.submit(job, tmp_path / "deployed")
    log = folders["north"] / "audit.jsonl"
    deadline = time.monotonic() + _PATIENCE
    while '"event": "allowed"' not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    (victim,) = answerers(loopback, "north")
    os.kill(victim.pid, signal.SIGKILL)
    run = loopback.wait(tmp_path / "deployed", _PATIENCE)
    assert run["status"] == "finished", run
    alone, together = final(tmp_path / "simulated"), final(tmp_path / "deployed")
    assert alone.keys() == together.keys()
    assert max(abs(alone[name] - together[name]).max() for name in alone) <= 1e-5
    for site, folder in folders.items():
        events = [line["event"] for line in audit_log(folder)]
        assert events[0] == "worker" and events.count("left") >= 1 + 2 * config.rounds
        assert "refused" not in events
        assert len(answerers(loopback, site)) == 1
    assert victim.pid != answerers(loopback, "north")[0].pid


def test_a_bundle_with_code_is_refused_by_every_site_and_never_run(
    loopback: Any, deployment: ModuleType, tiny_federation: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    job = deployment.deployed_config(config_of(tiny_federation, folders), tmp_path / "job.toml")
    loopback.submit(job, tmp_path / "evil", {"evil.py": f"open({str(mark)!r}, 'w').close()\n"})
    run = loopback.wait(tmp_path / "evil", _PATIENCE)
    assert run["status"] == "failed" and "holds evil.py" in run["error"]
    assert not mark.exists()
    refusals = [audit_log(folder)[-1] for folder in folders.values()]
    assert any(line["event"] == "refused" and "evil.py" in line["why"] for line in refusals)
