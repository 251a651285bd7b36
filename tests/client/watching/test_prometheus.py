"""A site's endpoint has what its files say, the budget by dataset among it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from fedgraft.client.watching.snapshot import Budget, Line, SiteView

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
