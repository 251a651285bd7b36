"""Krum, Multi-Krum and Bulyan: keep the updates that lie nearest to most others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from ...core.update import Update
from ..aggregator import Capabilities, Options, strategy
from .coordinatewise import Together, TogetherOptions
from .distances import gram, squared_distances
from .judging import Judge, RobustOptions, Sent


def krum_scores(squares: np.ndarray, attackers: int) -> np.ndarray:
    """score_k = the sum of the n - f - 2 smallest squared distances from k to others, for ``squares`` (n, n).

    At least one, for sets that are smaller than Krum allows (the last selections of Bulyan).
    """
    count = len(squares)
    others = squares + np.diag(np.full(count, np.inf))
    nearest = min(max(1, count - attackers - 2), count - 1)
    return np.sort(others, axis=1)[:, :nearest].sum(axis=1)


def bulyan_selection(squares: np.ndarray, attackers: int, keep: int) -> list[int]:
    """Krum again and again: each time the best is taken out, and the rest is scored anew."""
    left, taken = list(range(len(squares))), list[int]()
    while len(taken) < keep:
        scores = krum_scores(squares[np.ix_(left, left)], attackers)
        taken.append(left.pop(int(np.argmin(scores))))
    return sorted(taken)


class KrumOptions(RobustOptions):
    """``attackers``: f, how many sites may lie."""

    attackers: int = Field(1, ge=0, description="how many lying sites it stands; it needs 2 f + 3 sites")


@strategy("krum")
class Krum(Judge):
    """The one update that is nearest to its n - f - 2 nearest others; everything else is thrown away.

    score_k = sum of the n - f - 2 smallest |D_k - D_j|^2, D_k = dW_k - dW_0; needs n >= 2 f + 3. One update is left, so
    the result is one site's adapter and no average: the skew of its data comes with it. Ties go by the sites' names.

    Flower's ``Krum`` compares flat tensors. For adapters that is wrong where equal dW have different factors, it does
    not hold n against f, and it lets the sites' own word on their records weigh. Source: Blanchard et al. 2017,
    "Machine Learning with Adversaries", arXiv 1703.02757, section 4.
    """

    summary = "the update nearest to its n - f - 2 nearest others"
    equation = "k* = argmin_k sum_{j in N(k), |N(k)| = n - f - 2} |D_k - D_j|^2, D_k = s_k B_k A_k - s B_0 A_0"
    source = "Blanchard et al. 2017, arXiv 1703.02757"
    Options: ClassVar[type[Options]] = KrumOptions
    contract_sites = 7

    @property
    def needed(self) -> int:
        return 2 * self.options.attackers + 3

    @property
    def condition(self) -> str:
        return f"2 f + 3 = {self.needed} (attackers f = {self.options.attackers})"

    def judged(self, sent: list[Sent]) -> Iterable[Update]:
        scores = krum_scores(squared_distances(gram([one.change for one in sent])), self.options.attackers)
        best = sorted(np.argsort(scores, kind="stable")[: self.kept(len(sent))])
        return [replace(sent[k].update, weight=self.weight(sent[k].update)) for k in best]

    def kept(self, count: int) -> int:
        """How many of ``count`` updates are left."""
        return 1


class MultiKrumOptions(KrumOptions):
    """``keep``: m, how many updates are left; 0: n - f - 2."""

    keep: int = Field(0, ge=0, description="how many updates are left; 0: n - f - 2")


@strategy("multi-krum")
class MultiKrum(Krum):
    """The m updates of the best Krum scores, with equal weights; m = n - f - 2 unless ``keep`` says otherwise.

    See :class:`Krum`. m > n - f is refused: a liar would be among them whatever the scores. Flower's
    ``MultiKrum`` also weighs them by the records that they say they have. Source: Blanchard et al. 2017, arXiv
    1703.02757, section 6.
    """

    summary = "the m updates with the best Krum scores"
    equation = "M = the m smallest of score_k = sum_{j in N(k), |N(k)| = n - f - 2} |D_k - D_j|^2, equal weights"
    source = "Blanchard et al. 2017, arXiv 1703.02757"
    Options: ClassVar[type[Options]] = MultiKrumOptions

    @property
    def needed(self) -> int:
        return max(super().needed, self.options.keep + self.options.attackers)

    @property
    def condition(self) -> str:
        attackers, keep = self.options.attackers, self.options.keep
        if self.needed == 2 * attackers + 3:
            return super().condition
        return f"keep + f = {self.needed} (keep = {keep}, attackers f = {attackers})"

    def kept(self, count: int) -> int:
        return self.options.keep or count - self.options.attackers - 2


class BulyanOptions(TogetherOptions):
    """``attackers``: f, how many sites may lie."""

    attackers: int = Field(1, ge=0, description="how many lying sites it stands; it needs 4 f + 3 sites")


@strategy("bulyan")
class Bulyan(Together):
    """Krum picks n - 2 f updates one by one; of those, each number is the mean of the n - 4 f nearest to the median.

    Needs n >= 4 f + 3. The first stage compares dW; the second goes number by number through the factors, which is
    meaningful only where all sites trained from the same factors (see :mod:`.coordinatewise`). Krum's distances are
    counted anew after each pick, to max(1, n' - f - 2) of the n' that are left.

    Flower's ``Bulyan`` takes the n - 2 f best of a single scoring, of flat tensors. Source: El Mhamdi et al. 2018, "The
    Hidden Vulnerability of Distributed Learning in Byzantium", arXiv 1802.07927, section 4.
    """

    summary = "Krum n - 2 f times, then the mean of the n - 4 f numbers nearest to the median"
    equation = "S = n - 2 f picks of Krum; theta_i = mean of the n - 4 f of theta_k,i, k in S, nearest to their median"
    source = "El Mhamdi et al. 2018, arXiv 1802.07927"
    capabilities: ClassVar[Capabilities] = Capabilities(needs_individual=True)
    Options: ClassVar[type[Options]] = BulyanOptions
    contract_sites = 7

    @property
    def needed(self) -> int:
        return 4 * self.options.attackers + 3

    @property
    def condition(self) -> str:
        return f"4 f + 3 = {self.needed} (attackers f = {self.options.attackers})"

    def chosen(self, sent: list[Sent]) -> list[Sent]:
        squares = squared_distances(gram([one.change for one in sent]))
        keep = len(sent) - 2 * self.options.attackers
        return [sent[k] for k in bulyan_selection(squares, self.options.attackers, keep)]

    def combined(self, values: np.ndarray) -> np.ndarray:
        keep = len(values) - 2 * self.options.attackers
        away = np.abs(values - np.median(values, axis=0))
        nearest = np.argsort(away, axis=0, kind="stable")[:keep]
        return np.take_along_axis(values, nearest, axis=0).mean(axis=0)
