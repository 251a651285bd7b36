"""Ditto: beside the shared adapter each site trains one of its own, held near the shared one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT
from .local import LocalRule, Training
from .tensors import like


class DittoOptions(Options):
    """``lam`` (lambda): how near the personal adapter stays to the global one; 0: each site by itself."""

    lam: float = Field(0.1, ge=0)


class DittoSite(LocalRule):
    """Trains the shared adapter as FedIT does; :meth:`personal` trains the other one."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], lam: float) -> None:
        super().__init__(training, memory)
        self.lam = lam
        self._received: AdapterState | None = None

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        self._received = received
        return received

    def personal(self) -> LocalRule:
        return DittoPersonal(self.training, self.memory, self.lam, self._received)


class DittoPersonal(LocalRule):
    """Trains v on F_k(v) + lambda/2 |v - w|^2, where w is the adapter that the site received in this round."""

    def __init__(
        self,
        training: Training,
        memory: Mapping[str, AdapterState],
        lam: float,
        anchor: AdapterState | None,
    ) -> None:
        super().__init__(training, memory)
        self.lam = lam
        self._anchor: Mapping[str, np.ndarray] = anchor if anchor is not None else {}
        self._near: dict[str, Any] = {}

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        if name not in self._anchor:
            return gradient
        if name not in self._near:
            self._near[name] = like(self._anchor[name], value)
        return gradient + self.lam * (value - self._near[name])


@strategy("ditto")
class Ditto(FedIT):
    """Two adapters: the global w, averaged as FedIT, and a personal v_k, on F_k(v) + lambda/2 |v - w|^2.

    v_k stays at its site, goes on from round to round, and is what is evaluated there; w does not depend on it. The
    term pulls each factor towards its global value, not the product B A. A round costs two trainings. Under
    differential privacy the second would be a second release of the same records, to whoever sees v_k or what it
    scores, for which no budget is set aside: refused. Source: Li et al. 2021, "Ditto: Fair and Robust Federated
    Learning Through Personalization", arXiv 2012.04221, Algorithm 1.
    """

    summary = "a personal adapter v_k beside the global w, with the term lambda/2 |v_k - w|^2"
    equation = "w = sum p_k w_k;  v <- v - eta (grad F_k(v) + lambda (v - w)), v stays at site k"
    source = "Li et al. 2021, arXiv 2012.04221"
    capabilities = Capabilities(linear_sum=True)
    Options = DittoOptions

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return DittoSite(training, memory, self.options.lam)
