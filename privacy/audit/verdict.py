"""What a layer of the audit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """The answer of one layer.

    ``said``: the answer in one sentence; ``findings``: what is wrong, a line each, empty when all is good;
    ``statistics``: the numbers that it rests on; ``drawing``: the series for its chart.
    """

    layer: str
    said: str
    findings: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """In plain values, for the report."""
        return {
            "layer": self.layer,
            "good": self.good,
            "said": self.said,
            "findings": list(self.findings),
            "statistics": dict(self.statistics),
            "drawing": dict(self.drawing),
        }
