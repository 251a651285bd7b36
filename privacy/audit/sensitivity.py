"""Layer 2: without noise, two data sets that differ in one unit must give sums that differ by the clip at most.

Dwork and Roth 2014, definition 3.8 (L2 sensitivity), on neighbours that were made to stretch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .verdict import Verdict

#: Rounding may add this share, by what the model computes in: a row changes a little with the padding of its batch.
SLACK = {"fp32": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Neighbours:
    """Two data sets that differ in one unit, and how far apart their clipped sums came out.

    ``replaced``: one unit stands in for another, which may move the sum by 2 C, instead of one more or less.
    """

    name: str
    clip: float
    distance: float
    replaced: bool = False

    @property
    def share(self) -> float:
        """The distance as a share of what the guarantee allows."""
        return self.distance / (self.clip * (2 if self.replaced else 1))


def sensitivity(pairs: Sequence[Neighbours], slack: float) -> Verdict:
    """Whether every pair keeps the bound, up to ``slack`` of rounding."""
    findings = tuple(
        f"{pair.name}: the sums differ by {pair.distance / pair.clip:.3g} C, where {2 if pair.replaced else 1} C is "
        "promised"
        for pair in pairs
        if not pair.share <= 1 + slack
    )
    largest = max((pair.share for pair in pairs), default=0.0)
    said = (
        f"No crafted neighbour moved the sum by more than {largest:.4f} of what is promised."
        if not findings
        else f"{len(findings)} of {len(pairs)} crafted neighbours moved the sum by more than is promised."
    )
    return Verdict(
        "sensitivity",
        said,
        findings,
        {
            "slack": slack,
            "largest": largest,
            "pairs": [
                {"name": p.name, "clip": p.clip, "distance": p.distance, "replaced": p.replaced, "share": p.share}
                for p in pairs
            ],
        },
    )
