"""SCAFFOLD: control variates that take the sites' drift out of their local steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, strategy
from .averaging import RunningMean
from .local import LocalRule, Training
from .tensors import as_array, like

_MEMORY = "control"


def control(name: str) -> str:
    """The name of the control variate that accompanies tensor ``name``."""
    return f"{name}.control"


def _steered(spec: AdapterSpec) -> tuple[str, ...]:
    """The tensors that have a control variate: those that the sites train and share."""
    return tuple(tensor.name for tensor in spec.tensors if tensor.parameter and tensor.policy == "share")


def _controls(spec: AdapterSpec) -> tuple[TensorSpec, ...]:
    own = spec.by_name
    return tuple(
        TensorSpec(control(name), own[name].shape, own[name].dtype, role="control", parameter=False)
        for name in _steered(spec)
    )


class ScaffoldSite(LocalRule):
    """Steps along g - c_k + c; then c_k becomes the mean of the round's g, and c + (new c_k - old c_k) is sent.

    c_k is remembered at the site and begins at 0.
    """

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        held: Mapping[str, np.ndarray] = self.memory.get(_MEMORY, {})
        self._spec = received.spec
        self._common = {name: received[control(name)].astype(np.float64) for name in _steered(received.spec)}
        self._own = {
            name: held[control(name)].astype(np.float64) if control(name) in held else np.zeros(common.shape)
            for name, common in self._common.items()
        }
        self._correction: dict[str, Any] = {}
        self._sum: dict[str, Any] = {}
        self._count: dict[str, int] = {}
        return received

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        if name not in self._common:
            return gradient
        if name not in self._sum:
            self._correction[name] = like(self._common[name] - self._own[name], gradient)
            self._sum[name], self._count[name] = 0.0, 0
        self._sum[name] = self._sum[name] + gradient
        self._count[name] += 1
        return gradient + self._correction[name]

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        sent = dict(trained)
        self._next = dict(self._own)
        for name, total in self._sum.items():
            self._next[name] = as_array(total) / self._count[name]
        for name, common in self._common.items():
            moved = common + self._next[name] - self._own[name]
            sent[control(name)] = moved.astype(received[control(name)].dtype)
        return AdapterState(received.spec, sent, names=tuple(n for n in received.spec.names if n in sent))

    def remember(self) -> Mapping[str, AdapterState]:
        kept = {control(name): array.astype(self._spec.by_name[name].dtype) for name, array in self._next.items()}
        return {_MEMORY: AdapterState(self._spec, kept, names=tuple(kept))}


@strategy("scaffold")
class Scaffold(Aggregator):
    """Each local step goes along g_k - c_k + c: the site's own drift c_k is taken out, the mean drift c put in.

    Server: x = sum p_k y_k and c <- (1 - S/N) c + (S/N) sum p_k u_k, for the S of N sites that answered, where u_k =
    c + (new c_k - old c_k) is what a site sends beside its adapter y_k. The weights p_k stand in both sums, so that the
    corrections cancel in the mean, sum p_k (c - c_k) = 0, while all sites answer with the same weights; with equal
    weights this is the published rule. Rounding on the way (server.wire_dtype, server.upload) moves c from the mean of
    the c_k by as much, as does an answer that is lost.

    The new c_k is the mean of the gradients g_k of the round. With SGD at a fixed rate and no momentum that is the
    published option II, c_k - c + (x - y_k) / (K eta), exactly; it also holds under momentum, a schedule and AdamW,
    where x - y_k is no sum of gradients times eta. Variates belong to factors, not to products: c is what A and B
    drift by, each by itself. A server learning rate is server.lr. Traffic: twice FedIT's, both ways.

    Privacy. Under differential privacy the g_k are the clipped and noised gradients, which the site's plan accounts for
    as if each had been released by itself. Everything else is a function of these and of what the server sent: y_k by
    the optimiser's steps, c_k as a mean of them, u_k by a sum, over all rounds by induction. So what is sent is
    post-processing of one release, and costs no budget of its own; an adapter that is public says as much as its
    variates do. The noise in c_k about doubles the variance of the noise in y_k, and cancels in the mean as the
    corrections do. Source: Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II.
    """

    summary = "local steps along g - c_k + c, with control variates c_k and their mean c"
    equation = "y <- y - eta (g - c_k + c);  c_k' = mean g;  x = sum p_k y_k;  c <- c + S/N sum p_k (c_k' - c_k)"
    source = "Karimireddy et al. 2020, arXiv 1910.06378"
    capabilities = Capabilities(linear_sum=True)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._c: dict[str, np.ndarray] = {}

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return ScaffoldSite(training, memory)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        spec = state.spec.with_extras((*state.spec.extras, *_controls(state.spec)))
        tensors = dict(state)
        for name in _steered(state.spec):
            tensors[control(name)] = self._common(name, state[name]).astype(state[name].dtype)
        return AdapterState(spec, tensors)

    def _common(self, name: str, value: np.ndarray) -> np.ndarray:
        held = self._c.get(name)
        return np.zeros(value.shape) if held is None else held

    def start_round(self, state: AdapterState) -> None:
        self._mean, self._answered = RunningMean(), 0

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight)
        # An update that is of no single site stands for all of them.
        self._answered += 1 if update.site in self.ranks or not self.ranks else len(self.ranks)

    def result(self) -> AdapterState:
        mean = self._mean.take()
        share = min(1.0, self._answered / len(self.ranks)) if self.ranks else 1.0
        names = _steered(mean.spec)
        for name in names:
            if control(name) in mean:
                old = self._common(name, mean[name])
                self._c[name] = old + share * (mean[control(name)].astype(np.float64) - old)
        return mean.only(name for name in mean if mean.spec.by_name[name].parameter)

    def memory(self) -> Mapping[str, AdapterState]:
        if not self._c:
            return {}
        tensors = tuple(TensorSpec(name, c.shape, "float64", policy="local") for name, c in self._c.items())
        return {_MEMORY: AdapterState(AdapterSpec("scaffold", tensors), self._c)}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        self._c = {name: array.astype(np.float64) for name, array in memory.get(_MEMORY, {}).items()}
