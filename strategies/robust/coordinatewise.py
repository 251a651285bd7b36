"""Median and trimmed mean of each number of the adapter by itself.

A number of a factor says the same at two sites only where both began the round with the same factors. That is so
for every strategy that hands all sites one adapter (fedit, ffa, ...), and is checked; a server that makes new
factors for each site (mixed ranks) is refused. Of dW it means: with A frozen, the median of B is taken, which is no
median of dW = s B A either (a median does not go through a product), though a bound on each number of B bounds dW; with
both factors trained there is no statement on dW beyond that of each factor. What is left is one update.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ...core.update import Update
from ..aggregator import Options, strategy
from .judging import Judge, Sent

#: Who sent the one update that is left.
TOGETHER = "all sites together"


class TogetherOptions(Options):
    """``then``: the strategy that gets the one update that is left; ``then_options``: its options. No weights."""

    then: str = Field("fedit", description="the strategy that gets the one update that is left")
    then_options: dict[str, Any] = Field(default_factory=dict, description="options of that strategy")


class Together(Judge):
    """Makes one update of all, number by number; records do not weigh."""

    common_start = True
    Options: ClassVar[type[Options]] = TogetherOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if self.inner.capabilities.needs_individual:
            raise UserError(
                f"strategy `{self.name}` leaves one update, and `{self.options.then}` looks at several; name another "
                "strategy in strategy_options.then"
            )
        vars(self)["capabilities"] = replace(self.capabilities, heterogeneous_ranks=False)

    def chosen(self, sent: list[Sent]) -> list[Sent]:
        """Those whose numbers count."""
        return sent

    @abstractmethod
    def combined(self, values: np.ndarray) -> np.ndarray:
        """One tensor of ``values``, the sites' along the first axis, in float64."""

    def judged(self, sent: list[Sent]) -> Iterable[Update]:
        states = [one.update.state for one in self.chosen(sent)]
        first = states[0]
        numbers = {
            name: self.combined(np.stack([state[name].astype(np.float64) for state in states])).astype(array.dtype)
            for name, array in first.items()
        }
        return [Update(TOGETHER, AdapterState(first.spec, numbers, names=tuple(first)), 1.0)]

    def weight(self, update: Update) -> float:
        return 1.0


@strategy("median")
class Median(Together):
    """theta_i = median_k theta_k,i. Stands fewer than half of the sites lying, where the honest ones are alike.

    The same as Flower's ``FedMedian`` on the factors, with the checks of this module. Under skewed data a median
    leaves out what few sites know. Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv 1803.01498,
    definition 1.
    """

    summary = "the median of each number"
    equation = "theta_i = median_k theta_k,i"
    source = "Yin et al. 2018, arXiv 1803.01498"

    def combined(self, values: np.ndarray) -> np.ndarray:
        return np.median(values, axis=0)


class TrimmedOptions(TogetherOptions):
    """``attackers``: f, how many are cut off at each end."""

    attackers: int = Field(1, ge=0, description="how many lying sites it stands; it needs 2 f + 1 sites")


@strategy("trimmed-mean")
class TrimmedMean(Together):
    """theta_i = the mean of theta_k,i without the f largest and the f smallest; needs n >= 2 f + 1.

    Flower's ``FedTrimmedAvg`` with beta = f / n, on the factors. Source: Yin et al. 2018, arXiv 1803.01498,
    definition 2.
    """

    summary = "the mean of each number without the f largest and smallest"
    equation = "theta_i = mean of {theta_k,i} without the f largest and the f smallest"
    source = "Yin et al. 2018, arXiv 1803.01498"
    Options: ClassVar[type[Options]] = TrimmedOptions

    @property
    def needed(self) -> int:
        return 2 * self.options.attackers + 1

    @property
    def condition(self) -> str:
        return f"2 f + 1 = {self.needed} (attackers f = {self.options.attackers})"

    def combined(self, values: np.ndarray) -> np.ndarray:
        cut = self.options.attackers
        return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)
