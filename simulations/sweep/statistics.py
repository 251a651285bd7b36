"""What seeds say together: a mean, and how far it may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` seeds; ``half`` is half its confidence interval, None where one seed tells none."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    def apart(self, other: Estimate) -> bool:
        """Whether both have intervals, and these do not meet."""
        if self.half is None or other.half is None:
            return False
        return self.low > other.high or self.high < other.low


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """The mean of ``values`` (those that are None left out) and its 95 % interval; None where there are none.

    mean +- t s / sqrt(n), with s the standard deviation of the sample (n - 1) and t the 97.5 % point of Student's
    distribution with n - 1 degrees of freedom (Student 1908): right for n seeds whose values are normal.
    """
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, None, 1)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
    return Estimate(mean, quantile * statistics.stdev(known) / math.sqrt(len(known)), len(known))
