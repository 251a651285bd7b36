"""Server optimisers: the aggregated change of a round as a gradient, for momentum, Adam, Yogi and Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from .aggregator import Aggregator, Capabilities
from .wrapping import Wrapper

Kind = Literal["avg", "momentum", "adam", "yogi", "adagrad"]
#: What each kind remembers of the rounds before: the first moment m, the second moment v.
_MOMENTS: dict[str, tuple[str, ...]] = {
    "avg": (),
    "momentum": ("m",),
    "adam": ("m", "v"),
    "yogi": ("m", "v"),
    "adagrad": ("v",),
}
_METHOD = "server-optimiser"


def why_not(kind: str, capabilities: Capabilities, lr: float = 1.0) -> str | None:
    """Why a server optimiser cannot stand around a strategy with ``capabilities``; None: it can."""
    if kind == "avg" and lr == 1:
        return None
    if capabilities.resets_state:
        return "it makes new factors of the adapter each round, so a step between two rounds' tensors means nothing"
    if capabilities.touches_base:
        return "what it adds to the base weights belongs to the very factors that it gives, and a step changes these"
    if capabilities.needs_loss:
        return "it weighs or sorts the sites' changes by their losses, and what it gives is more than one change"
    return None


class ServerOptimiser(Wrapper):
    """x_{t+1} = x_t + step(Delta_t), where Delta_t = (what ``inner`` gives) - x_t, over the shared tensors.

    ========  =============================================================================================
    avg       lr Delta
    momentum  lr m, where m = momentum m + Delta
    adam      lr m / (sqrt(v) + tau), where m = momentum m + (1 - momentum) Delta, v = beta2 v + (1 - beta2) Delta^2
    yogi      the same, with v = v - (1 - beta2) Delta^2 sign(v - Delta^2)
    adagrad   lr Delta / (sqrt(v) + tau), where v = v + Delta^2
    ========  =============================================================================================

    m begins at 0 and v at tau^2, element by element, in float64. There is no bias correction, as published. ``avg``
    with lr 1 is ``inner``, to the bit; momentum at lr 1 takes steps of up to 1 / (1 - momentum) changes, and the
    adaptive ones of about lr in every number, whatever the change. A tensor that a round does not share keeps its value
    and its moments. Steps and moments are functions of what ``inner`` gives, so that a secure sum serves it as before,
    and privacy that ``inner``'s result has it keeps (post-processing).

    Sources: Reddi et al. 2021, "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2 (adam, yogi, adagrad);
    Hsu et al. 2019, arXiv 1909.06335 (momentum). Flower's ``FedAvgM``, ``FedAdam``, ``FedYogi`` and ``FedAdagrad`` give
    the same numbers (the tests compare), but for: v, which they begin at 0; a bias correction in ``FedAdam``, with
    exponents one round ahead, that Algorithm 2 does not have; and arithmetic in the arrays' own precision. They are not
    used here since they lose their moments when the server stops, take frozen and personal tensors for shared ones, and
    are bound to one way of averaging.
    """

    def __init__(
        self,
        inner: Aggregator,
        kind: Kind = "avg",
        lr: float = 1.0,
        momentum: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(inner)
        if kind not in get_args(Kind):
            raise UserError(f"server.optimizer `{kind}` is none of {', '.join(get_args(Kind))}")
        if reason := why_not(kind, inner.capabilities, lr):
            raise UserError(
                f'strategy `{inner.name}` cannot have server.optimizer "{kind}" with server.lr {lr:g}: {reason}; set '
                'server.optimizer = "avg" and server.lr = 1'
            )
        self.kind, self.lr, self.beta1, self.beta2, self.tau = kind, lr, momentum, beta2, tau
        self._identity = kind == "avg" and lr == 1
        if not self._identity:
            self.capabilities = replace(inner.capabilities, exact=False)  # type: ignore[misc]
        self._moments: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in _MOMENTS[kind]}

    def start_round(self, state: AdapterState) -> None:
        self._state = state
        super().start_round(state)

    def result(self) -> AdapterState:
        given = self.inner.result()
        if self._identity:
            return given
        state = self._state
        moved = dict(given)
        for name in given:
            tensor = given.spec.by_name[name]
            if name not in state or not tensor.parameter or state.spec.by_name[name].policy != "share":
                continue
            x = state[name].astype(np.float64)
            step = self._step(name, given[name].astype(np.float64) - x)
            with np.errstate(over="ignore"):  # told below, by tensor
                moved[name] = (x + step).astype(tensor.dtype)
        return AdapterState(given.spec, moved, names=tuple(given)).require_finite()

    def _step(self, name: str, delta: np.ndarray) -> np.ndarray:
        """What is added to tensor ``name``, whose change is ``delta``; moves its moments."""
        if self.kind == "avg":
            return self.lr * delta
        if self.kind == "momentum":
            m = self._moments["m"][name] = self.beta1 * self._moment("m", name, delta, 0.0) + delta
            return self.lr * m
        v, square = self._moment("v", name, delta, self.tau**2), delta**2
        if self.kind == "adagrad":
            m, v = delta, v + square
        else:
            m = self.beta1 * self._moment("m", name, delta, 0.0) + (1 - self.beta1) * delta
            self._moments["m"][name] = m
            if self.kind == "adam":
                v = self.beta2 * v + (1 - self.beta2) * square
            else:
                v = v - (1 - self.beta2) * square * np.sign(v - square)
        self._moments["v"][name] = v
        return self.lr * m / (np.sqrt(v) + self.tau)

    def _moment(self, moment: str, name: str, like: np.ndarray, begin: float) -> np.ndarray:
        held = self._moments[moment].get(name)
        return np.full(like.shape, begin) if held is None else held

    def own_memory(self) -> Mapping[str, AdapterState]:
        memory = {}
        for moment, tensors in self._moments.items():
            if tensors:
                kept = (TensorSpec(name, a.shape, dtype="float64", policy="local") for name, a in tensors.items())
                memory[f"optimiser-{moment}"] = AdapterState(AdapterSpec(_METHOD, tuple(kept)), tensors)
        return memory

    def own_recall(self, memory: Mapping[str, AdapterState]) -> None:
        """The inverse of :meth:`own_memory`; a checkpoint from before the first round holds none."""
        for moment in self._moments:
            held = memory.get(f"optimiser-{moment}")
            if held is not None and held.spec.method != _METHOD:
                raise UserError("the checkpoint's memory of server.optimizer is not one that this version wrote")
            self._moments[moment] = {name: array.astype(np.float64) for name, array in (held or {}).items()}
