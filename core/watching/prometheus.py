"""Metrics for Prometheus: an HTTP endpoint that looks anew at each scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from prometheus_client import Metric

#: Only this machine reads them, unless its owner says otherwise.
ADDRESS = "127.0.0.1"


@contextmanager
def endpoint(port: int, address: str, collect: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """Serve what ``collect`` gives at ``http://ADDRESS:PORT/metrics`` while the block runs; port 0 serves nothing.

    Raises :class:`UserError` where `prometheus_client` is not installed, or the port is taken.
    """
    if not port:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise UserError("--metrics-port needs prometheus_client: pip install 'fedgraft[watch]'") from None
    one_at_a_time = threading.Lock()

    class Collector:
        def collect(self) -> Iterable[Metric]:
            with one_at_a_time:
                return list(collect())

        def describe(self) -> Iterable[Metric]:
            return []

    registry = CollectorRegistry()
    registry.register(Collector())
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        raise UserError(
            f"--metrics-port {port}: cannot listen at {address}:{port}: {error.strerror or error}; choose another"
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
