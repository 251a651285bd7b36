"""FedNova: sites that take unequal numbers of steps count by their directions, not by how far they went."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..core.adapter import AdapterState, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, strategy
from .averaging import RunningMean
from .changes import change, moved
from .local import LocalRule, Training

#: The extra in which a site says how much weight its steps put on gradients.
EFFORT = "fednova.effort"


def effort(steps: int, momentum: float) -> float:
    """|a|_1 of SGD: a_j = (1 - momentum^(K - j)) / (1 - momentum) is the factor of the j-th of K gradients.

    Without momentum it is K. Wang et al., section 3 and appendix.
    """
    if momentum == 0:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class NormalisedSite(LocalRule):
    """Says, beside its adapter, how much weight its steps put on gradients."""

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        own = np.array([effort(self.training.steps, self.training.momentum)])
        sent = {**trained, EFFORT: own.astype(received[EFFORT].dtype)}
        return AdapterState(received.spec, sent, names=tuple(n for n in received.spec.names if n in sent))


@strategy("fednova")
class FedNova(Aggregator):
    """x <- x + (sum p_k |a_k|_1) sum p_k (y_k - x) / |a_k|_1, where |a_k|_1 = K_k without momentum.

    Each site's change is divided by the weight that its K_k local steps put on gradients, so that a site with more
    steps (data.sites[].local_steps) does not pull the adapter towards its own optimum; the mean is then taken as many
    steps far as the sites went on average. With equal steps it is FedIT. The normalisation is of factors, so that the
    mean dW is as inexact as FedIT's. It knows SGD, with momentum or without, at a rate that is the same at all sites;
    under AdamW, whose steps do not add up to gradients, it counts steps. One number more than FedIT travels up, which
    tells the number of steps and so nothing of the data. Source: Wang et al. 2020, arXiv 2007.07481, equation 6.
    """

    summary = "changes divided by the sites' local steps, then averaged"
    equation = "x <- x + tau sum p_k (y_k - x) / |a_k|_1,  tau = sum p_k |a_k|_1"
    source = "Wang et al. 2020, arXiv 2007.07481"
    capabilities = Capabilities(needs_individual=True)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return NormalisedSite(training, memory)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        # As the adapter's own numbers, which every form of server.upload takes.
        kind = "float32" if any(tensor.dtype == "float32" for tensor in state.spec.tensors) else "float64"
        told = TensorSpec(EFFORT, (1,), kind, role="effort", parameter=False)
        spec = state.spec.with_extras((*state.spec.extras, told))
        return AdapterState(spec, {**state, EFFORT: np.ones(1, kind)})

    def start_round(self, state: AdapterState) -> None:
        self._state, self._mean = state, RunningMean()

    def add(self, update: Update) -> None:
        own = float(update.state[EFFORT][0]) if EFFORT in update.state else 1.0
        # One step is the least there is; a smaller number would blow the site's change up.
        if not 0.5 <= own < np.inf:
            raise UserError(f"{update.site}: says that its steps come to {own:g}; one step is the least")
        self._mean.add(change(update.state, self._state, 1 / own), update.weight)

    def result(self) -> AdapterState:
        mean = self._mean.result()
        return moved(self._state, mean, float(mean[EFFORT][0]) if EFFORT in mean else 1.0)
