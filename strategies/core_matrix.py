"""Strategies that train small cores between frozen factors: Fed-SB and Ravan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import FedIT, RunningMean
from .local import LocalRule, Training
from .tensors import like

_BASIS, _LEFT = ".lora_A.default.basis.weight", ".lora_B.default.weight"
_CORE, _HEADS, _SCALE = (f".lora_A.default.core.{part}" for part in ("weight", "heads", "scale"))
_CHOSEN = ".chosen"


def _require_method(initial: AdapterState, name: str, method: str) -> None:
    if initial.spec.method != method:
        raise UserError(f"strategy {name} trains the core of method {method}: set method.name={method}")


def dense_cores(state: AdapterState) -> dict[str, np.ndarray]:
    """dW of each layer, by the name of its core, in float64. For tests and small models.

    dW = (alpha / r) B R A; of Ravan (alpha / (h r)) sum_i s_i B_i H_i A_i. A scale that the server gives out anew, and
    that never comes back, is in the heads already.
    """
    found = {}
    for tensor in state.spec.tensors:
        layer, _, part = tensor.name.partition(".lora_A.default.core.")
        if part not in ("weight", "heads"):
            continue
        core = state[tensor.name].astype(np.float64)
        if part == "heads":
            if state.spec.by_name[layer + _SCALE].policy == "share":
                core = core * state[layer + _SCALE].astype(np.float64)[:, None, None]
            h, r, _ = core.shape
            core = np.einsum("ipq,ij->ipjq", core, np.eye(h)).reshape(h * r, h * r)
        left, right = (state[layer + end].astype(np.float64) for end in (_LEFT, _BASIS))
        found[tensor.name] = (state.spec.alpha or 1.0) / len(core) * left @ core @ right
    return found


def _effect(state: AdapterState) -> dict[str, np.ndarray]:
    """For the contract suite: dense dW, and every other parameter that is exchanged."""
    cores = dense_cores(state)
    inside = (_BASIS, _LEFT, _SCALE)
    others = [t.name for t in state.spec.tensors if t.parameter and t.name in state and not t.name.endswith(inside)]
    return {**{name: state[name].astype(np.float64) for name in others}, **cores}


def _toy(method: str) -> AdapterSpec:
    """For the contract suite: two layers of the method, and a head."""
    heads, rank = 2, 3
    width = rank if method == "lora-sb" else heads * rank
    tensors = []
    for layer, (m, n) in (("base_model.model.query", (24, 20)), ("base_model.model.value", (18, 22))):
        tensors += [TensorSpec(layer + _BASIS, (width, n), role="basis", policy="freeze")]
        if method == "lora-sb":
            tensors += [TensorSpec(layer + _CORE, (rank, rank), role="core", averaging="linear")]
        else:
            tensors += [TensorSpec(layer + _HEADS, (heads, rank, rank), role="core", averaging="product")]
            tensors += [TensorSpec(layer + _SCALE, (heads,), role="scale", averaging="product")]
        tensors += [TensorSpec(layer + _LEFT, (m, width), role="basis", policy="freeze")]
    tensors += [TensorSpec("base_model.model.classifier.modules_to_save.default.bias", (3,), role="head")]
    return AdapterSpec(method, tuple(tensors), rank=rank, alpha=2.0 * rank, options={"common_rank": True})


@strategy("fed-sb")
class FedSB(FedIT):
    """R = sum p_k R_k: with B and A frozen and equal everywhere, sum p_k B R_k A = B (sum p_k R_k) A exactly.

    A site sends r^2 numbers a layer, whatever its width; B and A cross once. Few trained numbers also take little
    noise, and no noise is multiplied by noise. B and A are singular vectors of W0, or drawn (``method.init``); the
    paper takes those of a first gradient, which would be a release of its own. Source: Singhal et al. 2025, "Fed-SB: A
    Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", arXiv
    2502.15436.
    """

    summary = "R = sum p_k R_k between frozen B and A (method lora-sb)"
    equation = "dW = s B R A; R = sum_k p_k R_k; B and A frozen"
    source = "Singhal et al. 2025, arXiv 2502.15436"
    capabilities = Capabilities(linear_sum=True, exact=True)
    contract_effect = staticmethod(_effect)

    @staticmethod
    def contract_spec() -> AdapterSpec:
        return _toy("lora-sb")

    def prepare(self, initial: AdapterState) -> AdapterState:
        _require_method(initial, self.name, "lora-sb")
        return initial


class RavanOptions(Options):
    """``heads``: how many heads of each layer a site trains in a round (0: all); ``site_heads``: by site.

    ``pick``: which: ``random`` ones, new each round, or the ``largest`` by |s_i H_i| in the global adapter.
    """

    heads: int = Field(0, ge=0)
    site_heads: dict[str, int] = Field(default_factory=dict)
    pick: Literal["random", "largest"] = "random"


@strategy("ravan")
class Ravan(Aggregator):
    """H_i = sum p_k s_ki H_ki, and s_i = 1 again: what a site sends of head i is the product s_i H_i.

    dW = sum_i s_i B_i H_i A_i is linear in that product, so its mean is exact although s_i and H_i both train. With
    fewer ``heads`` than there are, a site leaves the others as they came and says which it trained; each head is then
    the mean over the sites that trained it, H_i = sum_{k trained i} p_k s_ki H_ki / sum_{k trained i} p_k, which is not
    the mean of all sites' dW. Which heads are trained hangs on names and the global adapter alone, on no record.

    Source: Raje et al. 2025, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", arXiv 2506.05568.
    """

    summary = "H_i = sum p_k s_ki H_ki between frozen B_i and A_i (method ravan)"
    equation = "dW = s sum_i s_i B_i H_i A_i; H_i = sum_k p_k s_ki H_ki, s_i = 1; B_i and A_i frozen"
    source = "Raje et al. 2025, arXiv 2506.05568"
    capabilities = Capabilities(linear_sum=True, exact=True)
    Options = RavanOptions
    contract_effect = staticmethod(_effect)

    @staticmethod
    def contract_spec() -> AdapterSpec:
        return _toy("ravan")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.picks = bool(self.options.heads or self.options.site_heads)
        if self.picks:
            # A mean over those that trained a head divides one sum by another, and noise on the second is not bounded.
            vars(self)["capabilities"] = replace(type(self).capabilities, linear_sum=False, exact=False)

    def prepare(self, initial: AdapterState) -> AdapterState:
        _require_method(initial, self.name, "ravan")
        tensors = dict(initial)
        for heads, scale in _heads(initial.spec).items():
            if initial.spec.by_name[scale].policy == "share":
                tensors[heads] = _product(initial[heads], initial[scale])
                tensors[scale] = np.ones_like(initial[scale])
        scales = set(_heads(initial.spec).values())
        spec = initial.spec.with_policy("receive", lambda t: t.name in scales and t.policy == "share")
        return AdapterState(spec, tensors)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        if not self.picks:
            return state
        spec = state.spec.with_extras([*state.spec.extras, *_marks(state.spec)])
        marks = {tensor.name: np.zeros(tensor.shape, dtype=tensor.dtype) for tensor in _marks(state.spec)}
        return AdapterState(spec, {**state, **marks})

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        count = self.options.site_heads.get(training.site, self.options.heads) if self.picks else 0
        return HeadTraining(training, memory, count, self.options.pick)

    def start_round(self, state: AdapterState) -> None:
        self._state = state
        self._mean = RunningMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight)

    def result(self) -> AdapterState:
        mean = self._mean.take()
        tensors = {name: array for name, array in mean.items() if name in self._state}
        for heads in _heads(self._state.spec) if self.picks else ():
            if heads not in mean:
                continue
            # Untrained heads came back as they were: the mean change is that of the trained ones, times their share.
            share = mean[heads + _CHOSEN].astype(np.float64)[:, None, None]
            before = self._state[heads].astype(np.float64)
            change = (mean[heads] - before) / np.where(share > 0, share, 1.0)
            tensors[heads] = (before + change).astype(mean[heads].dtype)
        return AdapterState(self._state.spec, tensors, names=tuple(tensors)).require_finite()


class HeadTraining(LocalRule):
    """Trains ``count`` heads of each layer (0: all) with their scales, and sends s_i H_i."""

    def __init__(
        self, training: Training, memory: Mapping[str, AdapterState], count: int, pick: Literal["random", "largest"]
    ) -> None:
        super().__init__(training, memory)
        self.count, self.pick = count, pick
        self._chosen: dict[str, np.ndarray] = {}

    def begin(self, received: AdapterState, loss: Any = None) -> AdapterState:
        self._chosen = {heads: self._choice(heads, received[heads]) for heads in _heads(received.spec)}
        return received

    def _choice(self, name: str, heads: np.ndarray) -> np.ndarray:
        """Which of ``heads`` train, as zeros and ones; of equally large ones, those that chance would take."""
        seed = hashlib.sha256(f"{self.training.site}|{self.training.round}|{name}".encode()).digest()
        order = np.random.default_rng(list(seed)).permutation(len(heads))
        if self.pick == "largest":
            sizes = np.linalg.norm(heads.astype(np.float64), axis=(1, 2))
            order = order[np.argsort(-sizes[order], kind="stable")]
        chosen = np.zeros(len(heads))
        chosen[order[: self.count or len(heads)]] = 1.0
        return chosen

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        heads = name.removesuffix(_SCALE) + _HEADS if name.endswith(_SCALE) else name
        chosen = self._chosen.get(heads)
        if chosen is None or chosen.all():
            return gradient
        return gradient * like(chosen.reshape((-1,) + (1,) * (len(gradient.shape) - 1)), gradient)

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        tensors = dict(trained)
        shared: Collection[str] = received.spec.select("share")
        for heads, scale in _heads(received.spec).items():
            if heads not in shared:
                continue
            chosen = self._choice(heads, received[heads])
            product = _product(trained[heads], trained[scale])
            tensors[heads] = np.where(chosen[:, None, None] > 0, product, received[heads])
            if heads + _CHOSEN in shared:
                tensors[heads + _CHOSEN] = chosen.astype(received[heads + _CHOSEN].dtype)
        return AdapterState(received.spec, tensors, names=tuple(tensors))


def _heads(spec: AdapterSpec) -> dict[str, str]:
    """The tensors of heads, each with that of its scales."""
    names = [tensor.name for tensor in spec.tensors if tensor.parameter and tensor.name.endswith(_HEADS)]
    return {name: name.removesuffix(_HEADS) + _SCALE for name in names}


def _marks(spec: AdapterSpec) -> list[TensorSpec]:
    """One number for each head that is shared: whether it was trained."""
    return [
        TensorSpec(name + _CHOSEN, (spec.by_name[name].shape[0],), spec.by_name[name].dtype, "mask", parameter=False)
        for name in _heads(spec)
        if spec.by_name[name].policy == "share"
    ]


def _product(heads: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """s_i H_i for every head."""
    return (heads.astype(np.float64) * scale.astype(np.float64)[:, None, None]).astype(heads.dtype)
