"""Strategies that bring the product of averaged factors nearer to the averaged product, at the server or the sites."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState, LowRankPair
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import FedIT
from .local import LocalRule, Training
from .refactoring import OtherTensors, require_factors, require_whole_pairs
from .residual import FactorMeans, equal_pairs
from .stacking import StackedSum


class LoRAFairOptions(Options):
    """``penalty``: lambda, on the size of what is added to B."""

    penalty: float = Field(0.01, ge=0)


@strategy("lora-fair")
class LoRAFair(Aggregator):
    """A = sum p_k A_k, B = sum p_k B_k + D with D = argmin |sum p_k B_k A_k - (B + D) A|^2 + lambda |D|^2.

    D = (sum p_k B_k A_k - B A) A^T (A A^T + lambda I)^-1, by one system of r x r; with B and A the means. Not exact:
    what lies outside of the rows of A is lost. The published loss is a cosine similarity, minimised by gradient steps;
    the squared distance aligns direction and size, and has this closed form. lambda is on the scale of A A^T (the
    scaling s belongs to both sides and falls out); with 0, D is the least-squares best. One site, or equal A, gives
    D = 0. Heads and biases are averaged. Source: Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with
    Aggregation and Initialization Refinement", arXiv 2411.14961, equation 8.
    """

    summary = "A = sum p_k A_k; B moved so that B A is nearest to sum p_k B_k A_k, |move| penalised"
    equation = "A = sum_k p_k A_k; B = sum_k p_k B_k; B += (sum_k p_k B_k A_k - B A) A^T (A A^T + lambda I)^-1"
    source = "Bian et al. 2025, arXiv 2411.14961"
    capabilities = Capabilities(needs_individual=True)
    Options = LoRAFairOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        self._means = FactorMeans(state)
        self._sums = {pair.a: StackedSum(len(state[pair.b]), state[pair.a].shape[1]) for pair in state.spec.pairs}

    def add(self, update: Update) -> None:
        pairs = list(equal_pairs(update, self._state))
        self._others.add(update)
        for pair, _ in pairs:
            self._means.add(update, pair)
            self._sums[pair.a].add(update.weight, update.state[pair.b], update.state[pair.a])

    def result(self) -> AdapterState:
        tensors = {**self._others.result(), **self._means.result()}
        for pair in self._state.spec.pairs:
            if pair.a in tensors:
                left, right = self._sums[pair.a].factors()
                a, b = tensors[pair.a], tensors[pair.b]
                gram = a @ a.T
                missed = left @ (right @ a.T) / self._others.weight - b @ gram
                penalised = gram + self.options.penalty * np.eye(len(a))
                # Where lambda is 0, A may have lost a direction, in which nothing can be done.
                tensors[pair.b] = b + missed @ np.linalg.pinv(penalised, rcond=1e-12, hermitian=True)
        return shaped(self._state, tensors)


class FLoRANAOptions(Options):
    """``sweeps``: how often the weights of both factors are fitted in turn, at most."""

    sweeps: int = Field(50, ge=1)


#: A sweep that brings the product less than this share of its size nearer is the last.
_STILL = 1e-6


@strategy("flora-na")
class FLoRANA(Aggregator):
    """A = sum u_k A_k, B = sum v_k B_k with (u, v) = argmin |sum p_k B_k A_k - (sum v_k B_k)(sum u_k A_k)|^2.

    One u and one v (K numbers each) for every pair, fitted in turn by least squares from u = v = p, so that the product
    is never further from the true mean than FedIT's. Not exact; nearer is what a refactoring gives (flexlora), whose
    factors are no combination of the sites'. A fit of all sites' factors needs all of them: memory grows with the
    number of sites, unlike other strategies'. The paper fits u and v by gradient steps. Heads and biases are averaged.
    Source: Nguyen et al. 2025, "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
    Adaptation", arXiv 2509.26399.
    """

    summary = "A = sum u_k A_k, B = sum v_k B_k with weights that bring B A nearest to sum p_k B_k A_k"
    equation = (
        "u, v = argmin |sum_k p_k B_k A_k - (sum_k v_k B_k)(sum_k u_k A_k)|^2; A = sum_k u_k A_k, B = sum_k v_k B_k"
    )
    source = "Nguyen et al. 2025, arXiv 2509.26399"
    capabilities = Capabilities(needs_individual=True)
    Options = FLoRANAOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        self._terms: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {pair.a: [] for pair in state.spec.pairs}

    def add(self, update: Update) -> None:
        pairs = list(equal_pairs(update, self._state))
        self._others.add(update)
        for pair, _ in pairs:
            self._terms[pair.a].append((update.weight, update.state[pair.b], update.state[pair.a]))

    def result(self) -> AdapterState:
        tensors = self._others.result()
        for pair in self._state.spec.pairs:
            if terms := self._terms[pair.a]:
                p = np.array([weight for weight, _, _ in terms]) / self._others.weight
                b = np.stack([b for _, b, _ in terms]).astype(np.float64)
                a = np.stack([a for _, _, a in terms]).astype(np.float64)
                tensors[pair.b], tensors[pair.a] = nearest_factors(p, b, a, self.options.sweeps)
        return shaped(self._state, tensors)


def nearest_factors(p: np.ndarray, b: np.ndarray, a: np.ndarray, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A, weighted sums of ``b`` (K, m, r) and ``a`` (K, r, n), whose product is near to sum_k p_k b_k a_k."""
    at = a.swapaxes(1, 2)
    u, v, last = p, p, np.inf
    for _ in range(sweeps):
        v, _ = _fitted(v, p, b, at, np.tensordot(u, at, 1))
        u, missed = _fitted(u, p, at, b, np.tensordot(v, b, 1))
        if missed >= last - _STILL * abs(missed):
            break
        last = missed
    return np.tensordot(v, b, 1), np.tensordot(u, a, 1)


def _fitted(
    start: np.ndarray, p: np.ndarray, x: np.ndarray, y: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, float]:
    """The weights w nearest to ``start`` that minimise |sum p_k x_k y_k^T - (sum w_k x_k) fixed^T|^2.

    ``x`` (K, m, r), ``y`` (K, n, r), ``fixed`` (n, r). Also the minimum, less the constant |sum p_k x_k y_k^T|^2.
    """
    # <x_i f^T, x_j f^T> = <x_i G, x_j> with G = f^T f, and <x_i f^T, T> = <x_i, T f>: nothing is of size (m, n).
    flat = x.reshape(len(x), -1)
    gram = (x @ (fixed.T @ fixed)).reshape(len(x), -1) @ flat.T
    product = np.tensordot(p[:, None, None] * x, y.swapaxes(1, 2) @ fixed, axes=((0, 2), (0, 1)))
    target = flat @ product.reshape(-1)
    weights = start + np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ (target - gram @ start)
    return weights, float(weights @ gram @ weights - 2 * weights @ target)


class FedRotOptions(Options):
    """``strength``: lambda between no rotation (0, which is FedIT) and all of it (1)."""

    strength: float = Field(0.5, ge=0, le=1)


@strategy("fedrot")
class FedRot(FedIT):
    """Site k sends (B_k R, R^T A_k); A = sum p_k R^T A_k, B = sum p_k B_k R, where R turns to the last global factors.

    In odd rounds R* = argmin |R^T A_k - A|, in even ones argmin |B_k R - B|, over rotations (det R = 1); then R is the
    rotation nearest to (1 - lambda) I + lambda R*. The product B_k A_k is as it was (up to rounding), only the mean of
    factors that are turned alike is nearer to the mean product; not exact. R comes from what the site sends anyway and
    what it received: under differential privacy it is post-processing. Source: Zhang et al. 2026, "FedRot-LoRA:
    Mitigating Rotational Misalignment in Federated LoRA", arXiv 2602.23638.
    """

    summary = "sites turn their factors, (B_k R, R^T A_k), towards the last global ones; then the mean"
    equation = (
        "R = rotation nearest to (1 - lambda) I + lambda argmin_R |R^T A_k - A|; A = sum p_k R^T A_k, B = sum p_k B_k R"
    )
    source = "Zhang et al. 2026, arXiv 2602.23638"
    capabilities = Capabilities(linear_sum=True)
    Options = FedRotOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule | None:
        return Turning(training, memory, self.options.strength)


class Turning(LocalRule):
    """Turns what was trained towards what was received, before it is sent."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], strength: float) -> None:
        super().__init__(training, memory)
        self.strength = strength

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        tensors = dict(trained)
        for pair in received.spec.pairs:
            # A factor that stays as it is everywhere, or stays here, cannot be turned with the other.
            if all(received.spec.by_name[name].policy == "share" for name in (pair.a, pair.b)):
                tensors |= self._turned(pair, trained, received)
        return AdapterState(trained.spec, tensors, names=tuple(trained))

    def _turned(self, pair: LowRankPair, trained: AdapterState, received: AdapterState) -> dict[str, np.ndarray]:
        a, b = trained[pair.a].astype(np.float64), trained[pair.b].astype(np.float64)
        if self.training.round % 2:
            turn = rotation(a @ received[pair.a].T, self.strength)
        else:
            turn = rotation(b.T @ received[pair.b], self.strength)
        return {
            pair.a: (turn.T @ a).astype(trained[pair.a].dtype),
            pair.b: (b @ turn).astype(trained[pair.b].dtype),
        }


def rotation(overlap: np.ndarray, strength: float) -> np.ndarray:
    """The rotation R with the largest tr(R^T ``overlap``), and of it the part ``strength``: 0 gives I, 1 all of R.

    In between it is the orthogonal matrix nearest to (1 - strength) I + strength R.
    """
    if not overlap.any():
        return np.eye(len(overlap))
    u, _, vt = np.linalg.svd(overlap)
    # A reflection would turn one direction of the factors against itself.
    u[:, -1] *= np.sign(np.linalg.det(u @ vt))
    u, _, vt = np.linalg.svd((1 - strength) * np.eye(len(overlap)) + strength * (u @ vt))
    turn: np.ndarray = u @ vt
    return turn


def shaped(state: AdapterState, tensors: Mapping[str, np.ndarray]) -> AdapterState:
    """The shared part of the next ``state``: ``tensors`` in its order and precision."""
    names = [name for name in state.spec.names if name in tensors]
    return AdapterState(
        state.spec, {name: np.asarray(tensors[name]).astype(state[name].dtype) for name in names}, names=names
    ).require_finite()
