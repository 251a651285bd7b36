"""Real processes on loopback, with TLS and keys: the run is that of the in-process engine, and strangers stay out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedgraft.client.site import supernode
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.files import write
from fedgraft.deployment.kits import SiteKit
from fedgraft.deployment.processes import Stopped
from fedgraft.privacy import Ledger
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.server.deployed import jobs, serving
from fedgraft.server.deployed.control import Control
from fedgraft.server.rundir import read_run
from fedgraft.simulations import choice
from fedgraft.simulations.loopback import running
from fedgraft.simulations.loopback.policies import policy_for
from fedgraft.simulations.loopback.running import Loopback, down

Job = Callable[..., RunConfig]


@pytest.fixture
def loopback(job: Job, tmp_path: Path) -> Loopback:
    found = Loopback(tmp_path / "dev", job())
    found.provision()
    return found


def _descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_a_server_starts_knows_the_roster_and_refuses_who_is_not_on_it(loopback: Loopback) -> None:
    kit, before, heard = loopback.server, _descendants(), []
    rogue = SiteKit.open(loopback.site("east"))
    # A key that the authority never signed, behind the site's own checks.
    key = certificates.new_key()
    certificates.write_key(rogue.key, key, ssh=True)

    def say(line: str) -> None:
        heard.append(line)
        if sum("may connect" in said for said in heard) < 3:
            return
        assert {node.name for node in Control(kit).nodes()} == {"east", "north", "south"}
        with httpx.Client(verify=str(kit.folder / "ca.crt")) as client:
            assert client.get(f"https://{kit.settings.server.address}/health").status_code == 200
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(supernode, "require_ready", lambda kit: kit.authority)
            with pytest.raises(UserError, match="does not know this site's key: not signed yet, not on the server's"):
                supernode.start(rogue, heard.append)
        raise Stopped

    serving.serve(kit, say)
    assert heard[0].startswith("serving development at 127.0.0.1:")
    assert _descendants() == before, "nothing that was started goes on"
    told = [line for line in audit_journal(kit.state / "audit.jsonl").entries() if line["event"] != "control"]
    assert [(line["event"], line.get("site")) for line in told] == [
        *(("registered", name) for name in ("east", "north", "south")),
        ("refused", None),
    ]
    assert told[-1]["key"] == certificates.key_fingerprint(key.public_key())
    line = audit_journal(rogue.state / "audit.jsonl").entries()[-1]
    assert (line["event"], line["kind"]) == ("refused", "start") and "does not know this site's key" in line["why"]
    assert (kit.folder / "logs" / "superlink.log").stat().st_mode & 0o777 == 0o600


def test_a_port_in_use_is_one_line(loopback: Loopback) -> None:
    import socket

    kit = loopback.server
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", kit.settings.server.port))
        taken.listen()
        with pytest.raises(
            UserError, match=r"cannot listen at 127.0.0.1:\d+: Address already in use; end what uses it"
        ):
            serving.serve(kit, print)


def test_a_superlink_that_cannot_start_says_why(loopback: Loopback) -> None:
    (loopback.server.folder / "state" / "superlink.db").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the SuperLink ended with code \d+: .* \(log: .*superlink.log\)"):
        serving.serve(loopback.server, print)


def test_a_site_without_a_path_gets_no_development_policy(job: Job) -> None:
    config = job()
    bare = config.model_copy(update={"data": config.data.model_copy(update={"sites": config.data.sites[:1]})})
    assert "path = " in policy_for(bare, "east")
    with pytest.raises(UserError, match="site west: give it records of its own"):
        policy_for(bare, "west")


def test_the_sites_of_one_machine_share_its_cores_unless_they_are_told_otherwise(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(running, "launch", lambda command, environment, log: given.append(environment))
    monkeypatch.setattr(choice, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    loopback = Loopback(tmp_path / "dev", job())
    loopback._start("east", "site", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    loopback._start("north", "site", tmp_path)
    assert [environment["OMP_NUM_THREADS"] for environment in given] == ["2", "5"]


def test_nothing_is_ended_where_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing of it is running"):
        down(tmp_path)
    # A process number that stands for somebody else's process by now.
    write(tmp_path / "processes.json", f'{{"server": [{psutil.Process().ppid()}, 1.0], "east": [99999999, 1.0]}}')
    assert down(tmp_path) == []
    assert psutil.pid_exists(psutil.Process().ppid())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_deployment_gives_what_the_in_process_engine_gives(
    loopback: Loopback, tiny_federation: Any, tmp_path: Path
) -> None:
    before = _descendants()
    with loopback.running(print):
        kit, control = loopback.server, Control(loopback.server)
        name, _ = jobs.submit(kit, control, loopback.config, "plain")
        jobs.require_completed(kit, control, name)
        fetched = jobs.fetch(kit, name, tmp_path / "fetched")
        control.close()
    assert _descendants() == before
    simulated = tiny_federation.run(loopback.config, tmp_path / "simulated")
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (fetched, tmp_path / "simulated")]
    one, two = (load_file(path) for path in weights)
    assert set(one) == set(two) and one
    assert max(float(np.abs(one[key] - two[key]).max()) for key in one) <= 1e-5
    assert read_run(fetched)["accuracy"] == pytest.approx(simulated["accuracy"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_private_job_is_in_each_site_s_ledger_and_a_revoked_site_is_stopped(job: Job, tmp_path: Path) -> None:
    config = job(private=True, rounds=1)
    loopback = Loopback(tmp_path / "dev", config)
    loopback.provision()
    with loopback.running(print):
        kit, control = loopback.server, Control(loopback.server)
        jobs.submit(kit, control, config, "private")
        jobs.require_completed(kit, control, "private")
        Authority(loopback.kits).revoke("east")
        loopback.processes["east"].wait(300)
        said = (loopback.folder / "logs" / "east.log").read_text()
        assert "takes this site's key no more: revoked or expired" in said and "Traceback" not in said
        with pytest.raises(UserError, match=r"data.sites: east: not on the roster"):
            jobs.submit(kit, control, config)
        control.close()
    run = read_run(kit.runs / "private")
    for site in config.site_names:
        entries = Ledger(loopback.site(site) / "state" / "ledgers").entries()
        assert [(e.about["run"], e.about["round"], e.part, e.steps, e.outcome) for e in entries] == [
            (run["run"], 1, "train", config.train.local_steps, "released")
        ]
        assert run["sites"][site]["privacy"]["steps"] == sum(entry.steps for entry in entries)
