"""A site's endpoint has what its files say, the budget by dataset among it."""

from __future__ import annotations

import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft import cli
from fedgraft.client.policy import TEMPLATE
from fedgraft.client.site import supernode
from fedgraft.client.watching.snapshot import Budget, Line, SiteView
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit
from fedgraft.deployment.processes import free_port

pytest.importorskip("prometheus_client")

VIEW = SiteView(
    "east",
    "x",
    worker=17,
    connected=None,
    last=Line(datetime(2026, 11, 23, tzinfo=UTC), "left", "train", "r", 2),
    answered={"train": 3, "hello": 1},
    refused={("train", "policy"): 2, ("?", "other"): 1},
    bytes_out=1234,
    budgets=(Budget("letters", 8.0, 1e-5, False, 3.0), Budget("letters", 4.0, 1e-5, True, trouble="damaged")),
    disk_free=99,
)


def test_every_number_of_a_site_is_a_metric() -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed

    from fedgraft.client.watching.prometheus import site_metrics

    class Collector:
        def collect(self):
            return site_metrics(VIEW)

    registry = CollectorRegistry()
    registry.register(Collector())
    families = parsed(generate_latest(registry).decode())
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    page = (Path(fedgraft.__file__).parent / "docs" / "watching.md").read_text(encoding="utf-8")
    assert [name for name, *_ in found if f"`{name}`" not in page] == []
    assert found == {
        ("fedgraft_site_worker_up",): 1,
        ("fedgraft_site_connected",): 0,
        ("fedgraft_site_policy_valid",): 1,
        ("fedgraft_site_disk_free_bytes",): 99,
        ("fedgraft_site_asked_timestamp_seconds",): datetime(2026, 11, 23, tzinfo=UTC).timestamp(),
        ("fedgraft_answers_total", "hello"): 1,
        ("fedgraft_answers_total", "train"): 3,
        ("fedgraft_refusals_total", "?", "other"): 1,
        ("fedgraft_refusals_total", "train", "policy"): 2,
        ("fedgraft_site_bytes_left_total",): 1234,
        ("fedgraft_budget_epsilon", "letters", "total"): 8,
        ("fedgraft_budget_epsilon", "letters", "year"): 4,
        # What a damaged ledger leaves is not known, so nothing is said.
        ("fedgraft_budget_epsilon_left", "letters", "total"): 5,
    }


def test_site_start_serves_the_metrics_of_its_own_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'name = "x"\n[server]\naddress = "127.0.0.1:9"\n[[site]]\nname = "east"\n'
    (tmp_path / "federation.toml").write_text(text)
    folder = Authority.create(tmp_path / "federation.toml", tmp_path / "kits").kits / "sites" / "east"
    (folder / "policy.toml").write_text(TEMPLATE)
    port, scraped = free_port(), []

    def start(kit: SiteKit, say: Any) -> None:
        scraped.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode())

    monkeypatch.setattr(supernode, "start", start)
    monkeypatch.setenv("FEDGRAFT_LOG_FORMAT", "text")
    monkeypatch.setattr(sys, "argv", ["fedgraft", "site", "start", "--kit", str(folder), "--metrics-port", str(port)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert 'fedgraft_budget_epsilon_left{dataset="discharge-letters",span="year"} 4.0' in scraped[0]
    assert "fedgraft_site_worker_up 0.0" in scraped[0] and "fedgraft_site_policy_valid 1.0" in scraped[0]
