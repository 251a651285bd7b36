"""Layer 1: the clipped sum of the engine against a loop that takes one example at a time.

Abadi et al. 2016, arXiv 1607.00133, algorithm 1: each unit's gradient by itself, scaled by min(1, C / norm), added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .verdict import Verdict

#: How far the two may lie apart, as a share of the tensor's norm, by what the model computes in.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
#: A tensor with less than this share of the whole norm is measured against this share: its gradient may be rounding.
_LEAST_SHARE = 1e-3


def clipped_sum(gradients: torch.Tensor, clip: float) -> torch.Tensor:
    """The sum of the rows of ``gradients`` (U, P), each scaled to norm ``clip`` at most; in float64."""
    rows = gradients.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    return (clip / norms.clamp(min=1e-300)).clamp(max=1.0) @ rows


@dataclass(frozen=True)
class Case:
    """One sum that was computed twice: ``observed`` by the engine, ``expected`` by the loop, both shape (P,)."""

    name: str
    clip: float
    observed: torch.Tensor
    expected: torch.Tensor


def exactness(cases: Sequence[Case], tensors: Sequence[tuple[str, int]], tolerance: float) -> Verdict:
    """Hold every case's sums against each other, tensor by tensor. ``tensors``: name and size, in order."""
    findings: list[str] = []
    errors: list[dict[str, Any]] = []
    for case in cases:
        expected = case.expected.double()
        whole = float(expected.norm())
        error = float((case.observed.double() - expected).norm()) / max(whole, 1e-300)
        at, worst, name = 0, 0.0, ""
        for tensor, size in tensors:
            want, got = expected[at : at + size], case.observed[at : at + size].double()
            at += size
            scale = max(float(want.norm()), _LEAST_SHARE * whole, 1e-300)
            apart = float((got - want).norm()) / scale
            # A sum that is not a number is no nearer than infinity.
            apart = apart if apart == apart else float("inf")
            if apart > worst:
                worst, name = apart, tensor
        errors.append({"case": case.name, "clip": case.clip, "error": _finite(error), "worst": _finite(worst)})
        if worst > tolerance:
            findings.append(
                f"{case.name}: tensor {name} is {worst:.2g} of its norm away from the per-example loop; "
                f"{tolerance:g} is rounding"
            )
    largest = max((entry["worst"] for entry in errors), default=0.0)
    said = (
        f"The engine's sum equals the loop's to {largest:.1e} in every tensor."
        if not findings
        else f"The engine's sum is not that of a per-example loop in {len(findings)} of {len(cases)} cases."
    )
    return Verdict("exactness", said, tuple(findings), {"tolerance": tolerance, "largest": largest, "cases": errors})


def _finite(value: float) -> float:
    """JSON knows no infinity."""
    return value if value == value and abs(value) < 1e300 else 1e300
