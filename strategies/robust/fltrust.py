"""FLTrust: a site is believed as far as it points where a trusted site points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from ...core.errors import UserError
from ...core.update import Update
from ..aggregator import Options, strategy
from .distances import Path, gram, moved
from .judging import Judge, RobustOptions, Sent


class FLTrustOptions(RobustOptions):
    """``root``: the trusted site."""

    root: str = Field(min_length=1, description="the site that is trusted; required")


@strategy("fltrust")
class FLTrust(Judge):
    """Trust TS_k = max(0, cos(D_k, D_root)); every change is brought to the length of the root's, and weighs TS_k.

    D_k = dW_k - dW_0 of all weights together: D = sum TS_k (|D_root| / |D_k|) D_k / sum TS_k. In the paper the server
    trains the trusted update on a few records of its own; here the site ``root`` does, which counts too, with TS = 1,
    so that the sum is never empty. A site's factors go along the straight line that it moved them, to the first point
    where its change of dW has the length wanted; the cosine is that of what it sent. A site that moved nothing has no
    direction and no trust. Source: Cao et al. 2021, "FLTrust: Byzantine-robust Federated Learning via Trust
    Bootstrapping", arXiv 2012.13995, section IV.
    """

    summary = "weights max(0, cos) to a trusted site's change of dW, all brought to its length"
    equation = "TS_k = max(0, <D_k, R> / |D_k| |R|); D = sum TS_k (|R| / |D_k|) D_k / sum TS_k; R = D of the root"
    source = "Cao et al. 2021, arXiv 2012.13995"
    Options: ClassVar[type[Options]] = FLTrustOptions
    # A site of the toy federation that moves less than the others, whose updates it then never extrapolates.
    contract_options: ClassVar[Mapping[str, str]] = {"root": "site-01"}

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.inner.ranks

    @ranks.setter
    def ranks(self, ranks: Mapping[str, int]) -> None:
        if ranks and self.options.root not in ranks:
            raise UserError(
                f"strategy_options.root: no site of the run is called `{self.options.root}`; there are "
                f"{', '.join(sorted(ranks))}"
            )
        self.inner.ranks = ranks

    def judged(self, sent: list[Sent]) -> Iterable[Update]:
        names = [one.update.site for one in sent]
        if self.options.root not in names:
            raise UserError(
                f"the trusted site {self.options.root} did not answer in this round, so nobody can be believed"
            )
        root = names.index(self.options.root)
        products = gram([one.change for one in sent])
        lengths = np.sqrt(np.diag(products))
        for k, one in enumerate(sent):
            if k == root:
                yield replace(one.update, weight=self.weight(one.update))
                continue
            trust = trust_score(products[k, root], lengths[k], lengths[root])
            if trust > 0:
                part = Path.between(one.received, one.update.state).reach(lengths[root])
                state = moved(one.received, one.update.state, part)
                yield replace(one.update, state=state, weight=trust * self.weight(one.update))


def trust_score(product: float, length: float, root: float) -> float:
    """max(0, cos); 0 where one of the two has no direction."""
    return min(1.0, max(0.0, float(product / (length * root)))) if length > 0 and root > 0 else 0.0
