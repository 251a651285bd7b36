"""A deployment of real processes as it is watched: from outside, while it runs, and without a word of a record."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.client.watching.snapshot import SiteReader
from fedgraft.core.config import RunConfig
from fedgraft.core.watching.logs import ENVIRONMENT
from fedgraft.deployment.kits import SiteKit
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control
from fedgraft.server.watching.deployment import KitReader
from fedgraft.simulations.loopback.running import Loopback

#: What every record of the tiny federation says somewhere: a word of its own, or its patient.
SECRET = re.compile(r"zq\d{4}|pt-\d{4}-xj")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_deployment_is_seen_at_every_stage_and_logs_no_record(
    job: Callable[..., RunConfig], tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "json")
    loopback = Loopback(tmp_path / "dev", job(private=True, **{"evaluate.every": 1}))
    loopback.provision()
    seen = set()
    with loopback.running(print):
        kit, control = loopback.server, Control(loopback.server)
        reader, sites = (
            KitReader(kit),
            {name: SiteReader(SiteKit.open(loopback.site(name))) for name in ("east", "north")},
        )
        deadline = time.monotonic() + 600
        while not all(view.worker and view.connected for view in (site.look() for site in sites.values())):
            assert time.monotonic() < deadline, "no site is up"
            time.sleep(0.2)
        assert not any(site.look().answered for site in sites.values())
        jobs.submit(kit, control, loopback.config, "watched")
        while (view := reader.look()).job is None or view.job.status not in ("finished", "failed"):
            assert time.monotonic() < deadline, view
            if view.job is not None and view.job.phase is not None:
                seen.add((view.job.phase.kind, view.job.phase.round))
            time.sleep(0.2)
        jobs.require_completed(kit, control, "watched")
        assert view.job.status == "finished" and view.sites == dict.fromkeys(("east", "north", "south"), True)
        after = {name: site.look() for name, site in sites.items()}
        reader.close()
        control.close()
    assert {("train", 1), ("train", 2)} <= seen
    told = {site.name: site.epsilon for site in view.job.sites}
    for name, at_site in after.items():
        assert at_site.answered == {"hello": 1, "train": 2, "evaluate": 3}
        assert max(budget.spent for budget in at_site.budgets) == pytest.approx(told[name], rel=1e-9)
        log = loopback.site(name) / "logs" / "worker.log"
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        assert [line["kind"] for line in lines if line["event"] == "left"].count("train") == 2
    # The ServerApp says its lines where `fedgraft job logs` finds them; no log anywhere holds a record.
    logs = [path for path in loopback.folder.rglob("*.log") if path.is_file()]
    assert len(logs) >= 7
    assert SECRET.search(Path(loopback.config.data.sites[0].path).read_text())
    assert [path for path in logs if SECRET.search(path.read_text(errors="replace"))] == []
