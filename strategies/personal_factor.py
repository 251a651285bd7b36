"""FedSA-LoRA: one factor is shared, the other is each site's own."""

from __future__ import annotations

from ..core.adapter import AdapterState
from .aggregator import Capabilities, strategy
from .averaging import FedIT
from .personal import is_head, kept_local
from .refactoring import require_factors


@strategy("fedsa")
class FedSA(FedIT):
    """A = sum p_k A_k; B and the head stay at their site: dW_k = s B_k A.

    A learns what the sites have in common, B what is a site's own. Not exact: A is averaged while each site's B
    differs, so that no dW is the mean. Under DP noise on B is never seen outside. Source: Guo et al. 2024,
    "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463.
    """

    summary = "A = sum p_k A_k, B and the head stay at the site"
    equation = "A = sum_k p_k A_k; B_k and head_k stay at site k"
    source = "Guo et al. 2024, arXiv 2410.01463"
    capabilities = Capabilities(linear_sum=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        own = {pair.b for pair in require_factors(initial, self.name).spec.pairs}
        return kept_local(initial, lambda tensor: tensor.name in own or is_head(tensor), "B", self.name)
