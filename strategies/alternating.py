"""Strategies that train one low-rank factor at a time: by rounds (RoLoRA), or by local steps (LA-LoRA)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from ..core.adapter import AdapterSpec, AdapterState
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT
from .local import LocalRule, Training
from .refactoring import require_factors


def resting_factors(spec: AdapterSpec, number: int) -> frozenset[str]:
    """The factors that rest in round ``number`` (from 1): every A in odd rounds, every B in even ones.

    B, which starts at zero, comes first: while it is zero A has no gradient.
    """
    return frozenset(pair.a if number % 2 else pair.b for pair in spec.pairs)


def with_factors_at_rest(state: AdapterState, number: int) -> AdapterState:
    """``state`` with the shared factors that rest in round ``number`` frozen; what is not shared anyway stays so."""
    resting = resting_factors(state.spec, number)
    spec = state.spec.with_policy("freeze", lambda t: t.name in resting and t.policy == "share")
    return state.with_spec(spec)


@strategy("rolora")
class RoLoRA(FedIT):
    """Odd rounds: A is frozen, B = sum p_k B_k; even rounds: B is frozen, A = sum p_k A_k. The head in every round.

    Exact in each round, since the factor at rest is equal at all sites: sum p_k B_k A = (sum p_k B_k) A. A site sends
    half; one that joins later is sent both factors. Under DP no noise is multiplied by noise within a round. Source:
    Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2502.01755,
    Algorithm 1.
    """

    summary = "B = sum p_k B_k in odd rounds, A = sum p_k A_k in even ones, the other factor frozen"
    equation = "odd rounds: B = sum_k p_k B_k, A frozen; even rounds: A = sum_k p_k A_k, B frozen"
    source = "Chen et al. 2025, arXiv 2502.01755"
    capabilities = Capabilities(linear_sum=True, exact=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return with_factors_at_rest(state, self.round)


class LaLoRAOptions(Options):
    """``smooth``: whether gradients are smoothed: only those with noise (``private``), ``always`` or ``never``."""

    smooth: Literal["private", "always", "never"] = "private"


@strategy("la-lora")
class LaLoRA(FedIT):
    """A site trains B in its steps 1, 3, 5, ... and A in steps 2, 4, 6, ...; the server averages both factors.

    The head trains in every step. A step is clipped and noised over the tensors that it trains alone, so the clipping
    bound is not shared between the factors. The noised gradient of a factor then passes the low-pass filter
    [1, 4, 6, 4, 1] / 16 along the wide side, the inputs for A and the outputs for B, which leaves 70/256 of the noise's
    variance; beyond the border the outermost entry goes on, so that a constant passes unchanged. The filter sees
    nothing but the noised gradient: post-processing. Not exact: both factors have moved when they are averaged.

    Source: Liu et al. 2026, "Rethinking LoRA for Privacy-Preserving Federated Learning in Large Models", arXiv
    2602.19926; the published code clips and noises the gradient of a whole batch, which protects no record.
    """

    summary = "B and A train in turn, step by step, their noised gradients smoothed; both are averaged"
    equation = (
        "step 1, 3, ...: B <- B - lr F(g_B), step 2, 4, ...: A <- A - lr F(g_A), F = [1 4 6 4 1]/16 along the wide "
        "side; A = sum_k p_k A_k, B = sum_k p_k B_k"
    )
    source = "Liu et al. 2026, arXiv 2602.19926"
    capabilities = Capabilities(linear_sum=True)
    Options = LaLoRAOptions

    def prepare(self, initial: AdapterState) -> AdapterState:
        return require_factors(initial, self.name)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        wanted = self.options.smooth
        return StepwiseAlternation(training, memory, wanted == "always" or (wanted == "private" and training.private))


class StepwiseAlternation(LocalRule):
    """B in the first step of a round, then A, and so on; with ``smooth``, their gradients without high frequencies."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], smooth: bool) -> None:
        super().__init__(training, memory)
        self.smooth = smooth
        self._wide: dict[str, int] = {}

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str]:
        self._wide = {pair.a: 1 for pair in spec.pairs} | {pair.b: 0 for pair in spec.pairs}
        resting = resting_factors(spec, step + 1)
        return [name for name in spec.bare.names if name not in resting]

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        if not (self.smooth and name in self._wide):
            return gradient
        return low_pass(gradient, self._wide[name])


def low_pass(matrix: Any, axis: int) -> Any:
    """The rows (axis 1) or columns (axis 0) of ``matrix`` convolved with [1, 4, 6, 4, 1] / 16, the border repeated."""
    length = matrix.shape[axis]
    total = matrix * (6 / 16)
    for shift, weight in ((-2, 1 / 16), (-1, 4 / 16), (1, 4 / 16), (2, 1 / 16)):
        at = [min(max(position + shift, 0), length - 1) for position in range(length)]
        total = total + (matrix[:, at] if axis else matrix[at]) * weight
    return total
