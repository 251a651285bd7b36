"""The endpoint of a run: in Prometheus' own form, and with the numbers of run.json."""

from __future__ import annotations

import re
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft.core.errors import UserError
from fedgraft.core.watching.prometheus import ADDRESS, endpoint
from fedgraft.deployment.processes import free_port
from fedgraft.server.watching.deployment import KitView
from fedgraft.server.watching.snapshot import RunReader

pytest.importorskip("prometheus_client")


def scraped(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample at ``port``, read by the strict parser of OpenMetrics."""
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed

    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    request = urllib.request.Request(f"http://{ADDRESS}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    families = list(parsed(text))
    assert all(family.name.startswith("fedgraft_") and family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): float(sample.value) for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture(scope="module")
def finished(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("metrics") / "run"
    return folder, tiny_federation.run(tiny_federation.private(), folder)


def test_a_scrape_has_the_numbers_of_run_json(finished: Any) -> None:
    from fedgraft.server.watching.prometheus import run_metrics

    folder, run = finished
    reader, port = RunReader(folder), free_port()
    with endpoint(port, ADDRESS, lambda: run_metrics(reader.look())):
        found = scraped(port)
        assert scraped(port) == found
    assert found["fedgraft_round", ()] == found["fedgraft_rounds", ()] == 3
    assert found["fedgraft_accuracy", ()] == run["accuracy"]["after"]
    assert found["fedgraft_bytes_total", (("direction", "up"),)] == run["bytes_up"]
    assert found["fedgraft_bytes_total", (("direction", "down"),)] == run["bytes_down"]
    statuses = {labels[0][1]: value for (name, labels), value in found.items() if name == "fedgraft_run_status"}
    assert [name for name, value in statuses.items() if value] == ["finished"] and len(statuses) == 5
    for kind, count in (("train", 3), ("evaluate", 4)):
        assert found["fedgraft_phase_seconds_count", (("kind", kind),)] == count
        assert found["fedgraft_phase_seconds_bucket", (("kind", kind), ("le", "+Inf"))] == count
        assert found["fedgraft_phase_seconds_bucket", (("kind", kind), ("le", "3600.0"))] == count
    for name, site in run["sites"].items():
        assert found["fedgraft_site_epsilon", (("site", name),)] == site["epsilon"]
        assert found["fedgraft_site_rounds_total", (("site", name),)] == 3
        assert found["fedgraft_site_steps_total", (("site", name),)] == 9
    page = (Path(fedgraft.__file__).parent / "docs" / "watching.md").read_text(encoding="utf-8")
    names = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in found}
    assert [name for name in names if f"`{name}`" not in page] == []
    # How many records a site has is the site's to tell.
    assert not [name for name, _ in found if "records" in name or "units" in name]


def test_a_run_that_is_not_there_has_no_metrics(tmp_path: Path) -> None:
    from fedgraft.server.watching.prometheus import run_metrics

    assert list(run_metrics(RunReader(tmp_path / "later").look())) == []


def test_a_server_tells_which_sites_it_sees(finished: Any) -> None:
    from fedgraft.server.watching.prometheus import kit_metrics

    port = free_port()
    view = KitView("x", "", {"east": True, "north": False}, RunReader(finished[0]).look())
    with endpoint(port, ADDRESS, lambda: kit_metrics(view)):
        found = scraped(port)
    assert found["fedgraft_server_up", ()] == 1 and found["fedgraft_round", ()] == 3
    assert found["fedgraft_site_up", (("site", "east"),)] == 1
    assert found["fedgraft_site_up", (("site", "north"),)] == 0


def test_the_endpoint_is_off_by_default_and_gone_with_its_block() -> None:
    with endpoint(0, ADDRESS, lambda: pytest.fail("nobody asks")):
        pass
    port = free_port()
    with endpoint(port, ADDRESS, lambda: []):
        assert scraped(port) == {}
        with pytest.raises(UserError, match=f"--metrics-port {port}: cannot listen"), endpoint(port, ADDRESS, list):
            pass
    with socket.socket() as probe:
        assert probe.connect_ex((ADDRESS, port)) != 0


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"pip install 'fedgraft\[watch\]'"), endpoint(free_port(), ADDRESS, list):
        pass
