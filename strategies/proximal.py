"""FedProx: each site is held near the adapter that its training began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from ..core.adapter import AdapterState
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT
from .local import LocalRule, Training


class FedProxOptions(Options):
    """``mu``: how strongly a site is held; 0: not at all (FedIT)."""

    mu: float = Field(0.01, ge=0)


class ProximalSite(LocalRule):
    """Trains on F_k(y) + mu/2 |y - x|^2, where x is what the site received; its personal tensors are free."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], mu: float) -> None:
        super().__init__(training, memory)
        self.mu = mu

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        # A personal tensor has no global value to be near to.
        self._free = frozenset(received.spec.select("local"))
        return received

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        return gradient if name in self._free else gradient + self.mu * (value - start)


@strategy("fedprox")
class FedProx(FedIT):
    """Sites add mu (y - x) to their gradients; the server averages as FedIT: A = sum p_k A_k, B = sum p_k B_k.

    The term pulls each factor towards its global value, not the product B A. It is a function of the adapter alone and
    is added after clipping and noise, so that under differential privacy it costs nothing and is not clipped away.
    Flower's ``FedProx`` sends mu and leaves the term to the user's client; here the site adds it. Source: Li et al.
    2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, Algorithm 2.
    """

    summary = "sites are held near the global adapter: gradient + mu (y - x)"
    equation = "g <- g + mu (y - x) at each local step;  A = sum p_k A_k, B = sum p_k B_k"
    source = "Li et al. 2020, arXiv 1812.06127"
    capabilities = Capabilities(linear_sum=True)
    Options = FedProxOptions

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return ProximalSite(training, memory, self.options.mu)
