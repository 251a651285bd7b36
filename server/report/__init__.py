"""The report of a run: one self-contained HTML page, drawn from the run directory alone."""

from __future__ import annotations

from .page import write_report

__all__ = ["write_report"]
