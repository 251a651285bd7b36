"""A run, and the server of a kit, as Prometheus metrics: what sites have sent, and nothing else of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from .deployment import KitView
from .snapshot import RunView

_STATUSES = ("starting", "running", "stopped", "finished", "failed")
#: Upper bounds of a phase's seconds; a round of a large model takes hours.
_BOUNDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)


def kit_metrics(view: KitView) -> Iterator[Metric]:
    """The server of a kit, the sites it sees, and its latest job."""
    yield GaugeMetricFamily("fedgraft_server_up", "Whether the server answers.", value=float(not view.trouble))
    up = GaugeMetricFamily("fedgraft_site_up", "Whether the server sees the site.", labels=["site"])
    for name, online in sorted(view.sites.items()):
        up.add_metric([name], float(online))
    yield up
    refused = CounterMetricFamily("fedgraft_server_refusals", "Whom the server turned away.", labels=["reason"])
    for why, count in sorted(view.refused.items()):
        refused.add_metric([why], count)
    yield refused
    if view.job is not None:
        yield from run_metrics(view.job)


def run_metrics(view: RunView) -> Iterator[Metric]:
    """A run; nothing where there is none yet."""
    if view.status == "absent":
        return
    info = GaugeMetricFamily("fedgraft_run_info", "The run.", labels=["run", "name", "strategy", "engine"])
    info.add_metric([view.run, view.name, view.strategy, view.engine], 1.0)
    yield info
    status = GaugeMetricFamily("fedgraft_run_status", "1 for what the run is.", labels=["status"])
    for known in _STATUSES:
        status.add_metric([known], float(known == view.status))
    yield status
    yield from _numbers(view)
    phase = GaugeMetricFamily("fedgraft_phase_elapsed_seconds", "Since the phase at hand began.", labels=["kind"])
    if view.phase is not None:
        phase.add_metric([view.phase.kind], view.phase_seconds())
    yield phase
    sent = CounterMetricFamily("fedgraft_bytes", "Payload between server and sites.", labels=["direction"])
    sent.add_metric(["up"], view.bytes_up)
    sent.add_metric(["down"], view.bytes_down)
    yield sent
    yield _histogram(view)
    yield from _sites(view)


def _numbers(view: RunView) -> Iterator[Metric]:
    for name, about, value in (
        ("round", "The round at hand, or the last one.", view.round),
        ("rounds", "Rounds that the run is to have.", view.rounds),
        ("seconds_left", "To the end, by the pace so far.", view.left),
        ("accuracy", "Of the last evaluation, 0 to 1.", view.accuracy[-1] if view.accuracy else None),
        ("loss", "Of the last evaluation.", view.loss[-1] if view.loss else None),
        ("epsilon_limit", "What the job lets each site spend.", view.epsilon),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"fedgraft_{name}", about, value=float(value))


def _histogram(view: RunView) -> Metric:
    family = HistogramMetricFamily("fedgraft_phase_seconds", "What phases took, by kind.", labels=["kind"])
    for kind, seconds in view.seconds.items():
        counts = [0] * (len(_BOUNDS) + 1)
        for value in seconds:
            counts[bisect_left(_BOUNDS, value)] += 1
        names = [*(str(bound) for bound in _BOUNDS), "+Inf"]
        buckets = [(name, float(sum(counts[: at + 1]))) for at, name in enumerate(names)]
        family.add_metric([kind], buckets, sum_value=sum(seconds))
    return family


def _sites(view: RunView) -> Iterable[Metric]:
    labels = ["site"]
    epsilon = GaugeMetricFamily("fedgraft_site_epsilon", "What the site says it spent.", labels=labels)
    heard = GaugeMetricFamily(
        "fedgraft_site_heard_timestamp_seconds", "When a phase ended it had part in.", labels=labels
    )
    answers = CounterMetricFamily("fedgraft_site_rounds", "Trainings the site answered.", labels=labels)
    steps = CounterMetricFamily("fedgraft_site_steps", "Optimiser steps in those.", labels=labels)
    missed = CounterMetricFamily("fedgraft_site_missed", "Trainings it gave nothing to.", labels=["site", "fault"])
    for site in view.sites:
        if site.epsilon is not None:
            epsilon.add_metric([site.name], site.epsilon)
        if site.heard is not None:
            heard.add_metric([site.name], site.heard.timestamp())
        answers.add_metric([site.name], site.answered)
        steps.add_metric([site.name], site.steps)
        for fault, count in site.missed.items():
            missed.add_metric([site.name, fault], count)
    return (epsilon, heard, answers, steps, missed)
