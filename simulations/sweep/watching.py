"""Whoever follows a sweep."""

from __future__ import annotations

from typing import Any


class Watching:
    """Told how a sweep goes; does nothing."""

    def started(self, total: int, left: int, processes: int) -> None:
        """``left`` of ``total`` runs are still to be carried out, in so many processes."""

    def begun(self, name: str) -> None:
        """A run begins."""

    def ended(self, row: dict[str, Any]) -> None:
        """A run has ended, as its row in `results.csv` says."""


UNWATCHED = Watching()
