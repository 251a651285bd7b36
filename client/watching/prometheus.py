"""A site as Prometheus metrics, for the site's own people: what it counts nobody else is told."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .snapshot import SiteView


def site_metrics(view: SiteView) -> Iterator[Metric]:
    """All that the site's files say."""
    yield GaugeMetricFamily("fedgraft_site_worker_up", "Whether a worker serves.", value=float(bool(view.worker)))
    connected = float(bool(view.connected))
    yield GaugeMetricFamily("fedgraft_site_connected", "Whether the SuperNode reaches the server.", value=connected)
    yield GaugeMetricFamily(
        "fedgraft_site_policy_valid", "Whether the policy can be read.", value=float(not view.trouble)
    )
    yield GaugeMetricFamily("fedgraft_site_disk_free_bytes", "Free where the kit lies.", value=float(view.disk_free))
    if view.last is not None and view.last.time is not None:
        at = view.last.time.timestamp()
        yield GaugeMetricFamily("fedgraft_site_asked_timestamp_seconds", "When it last answered or refused.", value=at)
    answers = CounterMetricFamily("fedgraft_answers", "Answers that left.", labels=["kind"])
    for kind, count in sorted(view.answered.items()):
        answers.add_metric([kind], count)
    yield answers
    refusals = CounterMetricFamily(
        "fedgraft_refusals", "Refusals, by the policy or another.", labels=["kind", "reason"]
    )
    for (kind, reason), count in sorted(view.refused.items()):
        refusals.add_metric([kind, reason], count)
    yield refusals
    yield CounterMetricFamily("fedgraft_site_bytes_left", "Payload that left the site.", value=view.bytes_out)
    labels = ["dataset", "span"]
    allowed = GaugeMetricFamily("fedgraft_budget_epsilon", "What the policy allows.", labels=labels)
    left = GaugeMetricFamily("fedgraft_budget_epsilon_left", "What is left of it.", labels=labels)
    for budget in view.budgets:
        span = [budget.dataset, "year" if budget.year else "total"]
        allowed.add_metric(span, budget.allowed)
        if not budget.trouble:
            left.add_metric(span, budget.left)
    yield allowed
    yield left
