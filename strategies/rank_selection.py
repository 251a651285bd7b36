"""LoRA-A2: one factor at a time, and of that only the ranks that a site's own training moved most."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState
from .aggregator import Capabilities, Options, strategy
from .alternating import with_factors_at_rest
from .averaging import FedIT
from .local import LocalRule, Training
from .refactoring import require_factors


class LoRAA2Options(Options):
    """``budget``: ranks of each layer that a site sends, on average over the layers; ``budgets``: by site."""

    budget: int = Field(2, ge=1)
    budgets: dict[str, int] = Field(default_factory=dict)


@strategy("lora-a2")
class LoRAA2(FedIT):
    """Alternate as RoLoRA; of the factor that trains a site sends its most important ranks and leaves the others.

    In odd rounds rank i of layer l counts S_li = s_l |dB_l[:, i]| |A_l[i, :]|, the Frobenius norm of what it added to
    dW (in even rounds |B_l[:, i]| |dA_l[i, :]|). Of all layers together the ``budget`` x layers largest are kept, and
    the others go back to where the round began, so that they are no news on the wire. Then B = sum p_k B_k: exact, the
    mean of what the sites kept. Sites may differ in their budget; the adapter on each is whole.

    The site chooses when its training ends, from its own update: under differential privacy from the noised one, so
    that what is sent, and which ranks these are, is post-processing of it. Without, which ranks a site moved is for the
    server to see. Source: Koo et al. 2025, "Towards Robust and Efficient Federated Low-Rank Adaptation with
    Heterogeneous Clients", arXiv 2410.22815, section 3.
    """

    summary = "as rolora, and a site sends only the ranks that it moved most"
    equation = (
        "odd rounds: S_li = s_l |dB_l[:,i]| |A_l[i,:]|, keep the budget x L largest of all layers, B = sum_k p_k B_k; "
        "even rounds: the same for A"
    )
    source = "Koo et al. 2025, arXiv 2410.22815"
    capabilities = Capabilities(linear_sum=True, exact=True)
    Options = LoRAA2Options

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return with_factors_at_rest(state, self.round)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return RankSelection(training, memory, self.options.budgets.get(training.site, self.options.budget))


class RankSelection(LocalRule):
    """Sends the most important ranks, ``budget`` a layer on average; the others as they were received."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], budget: int) -> None:
        super().__init__(training, memory)
        self.budget = budget

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        spec = received.spec
        shared = set(spec.select("share"))
        layers = [pair for pair in spec.pairs if (pair.a in shared) != (pair.b in shared)]
        scores = [importance(trained, received, at) for at, pair in enumerate(spec.pairs) if pair in layers]
        kept = most_important(scores, self.budget * len(layers))
        tensors = dict(trained)
        for pair, keep in zip(layers, kept, strict=True):
            name = pair.b if pair.b in shared else pair.a
            columns = keep if name == pair.b else keep[:, None]
            tensors[name] = np.where(columns, trained[name], received[name])
        return AdapterState(spec, tensors, names=tuple(trained))


def importance(trained: AdapterState, received: AdapterState, at: int) -> np.ndarray:
    """What each rank of the pair ``at`` added to dW, as a Frobenius norm: of an outer product, one for each rank."""
    pair = received.spec.pairs[at]
    a, b = (received[name].astype(np.float64) for name in (pair.a, pair.b))
    da, db = (trained[name].astype(np.float64) - old for name, old in ((pair.a, a), (pair.b, b)))
    moved_b = np.linalg.norm(db, axis=0) * np.linalg.norm(a, axis=1)
    moved_a = np.linalg.norm(b, axis=0) * np.linalg.norm(da, axis=1)
    # One of the factors rested, so that one of the two is zero.
    return np.asarray(pair.scaling * (moved_b + moved_a))


def most_important(scores: list[np.ndarray], count: int) -> list[np.ndarray]:
    """For each layer which of its ranks are among the ``count`` largest of all; the earlier of equals first."""
    whole = np.concatenate([*scores, np.zeros(0)])
    keep = np.zeros(len(whole), dtype=bool)
    keep[np.argsort(-whole, kind="stable")[:count]] = True
    return np.split(keep, np.cumsum([len(score) for score in scores])[:-1]) if scores else []
