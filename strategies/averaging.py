"""Averages of adapter tensors: one running sum, whatever the number of sites."""

from __future__ import annotations

import numpy as np

from ..core.adapter import AdapterSpec, AdapterState, LowRankPair, explain_shape
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, strategy

#: Numbers that are widened at once: few enough to stay in the processor's cache.
_BLOCK = 1 << 15


class RunningMean:
    """A weighted mean of adapter states that holds one running sum, in float64, whatever the number of sites.

    ``add(state, w)`` then ``result()`` gives sum w_k theta_k / sum w_k. Raises :class:`UserError` for a weight that is
    not positive and finite, a non-finite tensor, or tensors (or their scaling) that differ from the first state's.
    """

    def __init__(self) -> None:
        self._sum: dict[str, np.ndarray] = {}
        self._spec: AdapterSpec | None = None
        self._taken: AdapterState | None = None
        self.weight = 0.0

    def add(self, state: AdapterState, weight: float) -> None:
        if not (weight > 0 and np.isfinite(self.weight + weight)):
            raise UserError(f"the weight of an update is {weight}; it must be a positive number")
        if self._taken is not None:
            raise ValueError("the mean was taken: an update that comes after it would be lost")
        state.require_finite()
        if self._spec is None:
            self._spec = state.spec
            self._sum = {name: np.zeros(array.shape) for name, array in state.items()}
        self._require_alike(state, self._spec)
        for name, array in state.items():
            flat, total = array.reshape(-1), self._sum[name].reshape(-1)
            for start in range(0, array.size, _BLOCK):
                # numpy multiplies a float32 array by a float scalar in float32: widen first.
                wide = flat[start : start + _BLOCK].astype(np.float64)
                wide *= weight
                total[start : start + _BLOCK] += wide
        self.weight += weight

    def result(self) -> AdapterState:
        return self._taken if self._taken is not None else self._means(keep=True)

    def take(self) -> AdapterState:
        """:meth:`result`, and no more updates: each sum goes as its mean comes, so that they are never held at once."""
        if self._taken is None:
            self._taken = self._means(keep=False)
        return self._taken

    def _means(self, *, keep: bool) -> AdapterState:
        if self._spec is None:
            raise UserError("no update arrived: there is nothing to average")
        names, tensors = tuple(self._sum), {}
        for name in names:
            if keep:
                total = self._sum[name] / self.weight
            else:
                total = self._sum.pop(name)
                total /= self.weight
            mean = np.asarray(total).astype(self._spec.by_name[name].dtype)
            mean.flags.writeable = False  # or the state would copy it
            tensors[name] = mean
        return AdapterState(self._spec, tensors, names=names).require_finite()

    def _require_alike(self, state: AdapterState, spec: AdapterSpec) -> None:
        """Raise :class:`UserError` unless numbers of ``state`` mean the same as those of the first, of ``spec``."""
        if tuple(state) != tuple(self._sum):
            odd = min(set(state) ^ set(self._sum), default="")
            raise UserError(f"two updates differ in their tensors: {odd or 'in their order'}")
        for name, array in state.items():
            if array.shape != self._sum[name].shape:
                raise UserError(explain_shape(name, array.shape, self._sum[name].shape))
        # Factors under another scale or layout have the right shapes, and a mean that is worse than none.
        if state.spec.pairs != spec.pairs and _factors(state, state.spec) != _factors(state, spec):
            raise UserError("two updates scale or lay out their low-rank factors differently; set method.alpha alike")


def _factors(state: AdapterState, spec: AdapterSpec) -> list[LowRankPair]:
    """The pairs of ``spec`` of which ``state`` holds a factor."""
    return [pair for pair in spec.pairs if pair.a in state or pair.b in state]


@strategy("fedit")
class FedIT(Aggregator):
    """Average every tensor: A = sum p_k A_k, B = sum p_k B_k, with p_k = w_k / sum w.

    The hard baseline when its learning rate is tuned. Not exact for low-rank factors: mean(B) mean(A) is not
    mean(B A). Source: Zhang et al. 2024, "Towards Building the Federated GPT", arXiv 2305.05644.
    """

    summary = "A = sum p_k A_k, B = sum p_k B_k"
    source = "Zhang et al. 2024, arXiv 2305.05644"
    capabilities = Capabilities(linear_sum=True)

    def start_round(self, state: AdapterState) -> None:
        self._mean = RunningMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight)

    def result(self) -> AdapterState:
        return self._mean.take()
