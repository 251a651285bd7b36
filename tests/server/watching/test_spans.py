"""Spans of a run and its sites, as a collector of OpenTelemetry gets them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.core.watching import tracing

pytest.importorskip("opentelemetry.sdk")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where the spans of this process end up."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    found = InMemorySpanExporter()
    tracer = tracing.made(SimpleSpanProcessor(found))
    monkeypatch.setattr(tracing, "tracer", lambda: tracer)
    return found


def test_a_run_has_a_span_and_each_phase_and_instruction_one(
    tiny_federation: Any, tmp_path: Path, exporter: Any
) -> None:
    run = tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / "run")
    spans = exporter.get_finished_spans()
    (whole,) = [span for span in spans if span.name == "fedgraft.run"]
    assert dict(whole.attributes) == {"fedgraft.run": run["run"], "fedgraft.round": 1, "fedgraft.rounds": 1}
    phases = [span for span in spans if span.parent is not None]
    assert [(span.name, span.attributes["fedgraft.round"]) for span in phases] == [
        ("fedgraft.evaluate", 0),
        ("fedgraft.train", 1),
        ("fedgraft.evaluate", 1),
    ]
    assert all(span.parent.span_id == whole.context.span_id for span in phases)
    assert all(whole.start_time <= span.start_time <= span.end_time <= whole.end_time for span in phases)
    assert [span.attributes["fedgraft.answered"] for span in phases] == [3, 3, 3]
    at_sites = [span for span in spans if "fedgraft.site" in span.attributes]
    assert {(span.name, span.attributes["fedgraft.site"]) for span in at_sites} == {
        (f"fedgraft.{kind}", site) for kind in ("hello", "train", "evaluate") for site in ("east", "north", "south")
    }
    assert all(span.attributes["fedgraft.event"] == "left" for span in at_sites)
    known = {
        "run",
        "round",
        "rounds",
        "kind",
        "sites",
        "site",
        "event",
        "answered",
        "missing",
        "bytes_up",
        "bytes_down",
    }
    known |= {"accuracy", "loss"}
    assert {key.removeprefix("fedgraft.") for span in spans for key in span.attributes} == known


def test_a_run_that_fails_says_why(tiny_federation: Any, tmp_path: Path, exporter: Any) -> None:
    def between(site: str, message: Any, answer: Any) -> Any:
        if message.metadata.message_type == "train":
            raise UserError("the cable was cut")
        return answer()

    with pytest.raises(UserError):
        tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "run", between)
    failed = {span.name: span.status.description for span in exporter.get_finished_spans() if not span.status.is_ok}
    assert failed == dict.fromkeys(("fedgraft.run", "fedgraft.train"), "the cable was cut")


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            return

    for host in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(host, "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        tracing.tracer.cache_clear()
        try:
            span = tracing.begin("fedgraft.train", site="north", records={"no": "plain value"})
            tracing.end(span, "the cable was cut")
            tracer = tracing.tracer()
            assert tracer is not None
            tracer.span_processor.force_flush()  # type: ignore[attr-defined]
        finally:
            tracing.tracer.cache_clear()
            server.shutdown()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    assert b"fedgraft.train" in body and b"the cable was cut" in body and b"plain value" not in body


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing.tracer.cache_clear()
    yield monkeypatch
    tracing.tracer.cache_clear()


def test_nobody_who_did_not_ask_is_traced(asked: pytest.MonkeyPatch) -> None:
    asked.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.begin("fedgraft.run") is None
    tracing.tracer.cache_clear()
    asked.delenv("OTEL_SDK_DISABLED")
    asked.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    assert tracing.begin("fedgraft.run") is None
    tracing.end(None, "nothing to end")


def test_without_the_library_there_are_no_spans(asked: pytest.MonkeyPatch) -> None:
    asked.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing.begin("fedgraft.run") is None
