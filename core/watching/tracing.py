"""OpenTelemetry spans, where it is installed and its environment variables say where to; else nothing at all.

Spans have the attributes that the log's events have: no record, no text of a record, no number about single people.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor
    from opentelemetry.trace import Span, Tracer

_WANTED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PLAIN = (str, bool, int, float)


@cache
def tracer() -> Tracer | None:
    """This process' tracer, set up once; None where nobody asks for spans, or nothing is installed to send them."""
    if not any(os.environ.get(name) for name in _WANTED) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    return made(BatchSpanProcessor(OTLPSpanExporter()))


def made(processor: SpanProcessor) -> Tracer:
    """A tracer whose spans go to ``processor``, the last of them when the process ends."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    # What is given here beats the environment's, so that is asked first.
    name = os.environ.get("OTEL_SERVICE_NAME", "fedgraft")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(processor)
    return provider.get_tracer("fedgraft")


def begin(name: str, parent: Span | None = None, seconds_ago: float = 0.0, **values: Any) -> Span | None:
    """Begin the span ``name`` inside ``parent``; None where there is no tracer."""
    found = tracer()
    if found is None:
        return None
    from opentelemetry.trace import set_span_in_context

    context = set_span_in_context(parent) if parent is not None else None
    start = time.time_ns() - round(seconds_ago * 1e9)
    return found.start_span(name, context=context, start_time=start, attributes=_attributes(values))


def add(span: Span | None, **values: Any) -> None:
    """Add what is known by now to ``span``."""
    if span is not None:
        span.set_attributes(_attributes(values))


def end(span: Span | None, error: str = "", **values: Any) -> None:
    """End ``span`` with what is known by now; ``error``: the one line that says why it failed."""
    if span is None:
        return
    add(span, **values)
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error))
    span.end()


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"fedgraft.{key}": value for key, value in values.items() if isinstance(value, _PLAIN)}
