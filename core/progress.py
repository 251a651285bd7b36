"""What a run tells whoever watches it. Nothing here crosses the wire: a site's steps are seen at the site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Watch:
    """Receives the events of a run; every method may be overridden, none needs to be."""

    def note(self, text: str) -> None:
        """Something a person should read now (a corrupt checkpoint passed over, a site that is missing)."""

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """The sites have answered; training begins at ``first_round``."""

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        """A training or an evaluation begins."""

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        """A simulated site has taken a step."""

    def smaller_batch(self, site: str, setting: str, size: int, text: str) -> None:
        """At a simulated site memory has room for no more than ``size`` examples where ``setting`` asks for more."""
        self.note(f"site {site}: {text}")

    def cohort_found(self, size: int, text: str) -> None:
        """A measurement has found how many simulated sites to train in one pass; ``text`` says why."""
        if size > 1:
            self.note(text)

    def site_finished(self, kind: str, site: str) -> None:
        """A simulated site has answered."""

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        """A training or an evaluation is over; ``record`` is its line of metrics.jsonl."""


class Passing(Watch):
    """Passes every event on to ``watch``; a subclass looks at some of them."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def note(self, text: str) -> None:
        self.watch.note(text)

    def run_started(self, *, first_round: int, rounds: int, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self.watch.run_started(first_round=first_round, rounds=rounds, sites=sites)

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        self.watch.phase_started(kind, round, sites)

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        self.watch.site_step(site, step, steps, loss, epsilon)

    def smaller_batch(self, site: str, setting: str, size: int, text: str) -> None:
        self.watch.smaller_batch(site, setting, size, text)

    def cohort_found(self, size: int, text: str) -> None:
        self.watch.cohort_found(size, text)

    def site_finished(self, kind: str, site: str) -> None:
        self.watch.site_finished(kind, site)

    def phase_finished(self, record: Mapping[str, Any]) -> None:
        self.watch.phase_finished(record)


SILENT = Watch()
