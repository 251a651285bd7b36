"""Updates of a small adapter of two low-rank layers, a head and a bias; and dense twins of what sites change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator

M, N, RANK = 6, 5, 3


def make_spec(dtype: str = "float64", rank: int = RANK, scaling: float = 2.5) -> AdapterSpec:
    tensors, pairs = [], []
    for layer in ("q", "v"):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        tensors += [
            TensorSpec(a, (rank, N), dtype=dtype, role="lora_A", averaging="product"),
            TensorSpec(b, (M, rank), dtype=dtype, role="lora_B", averaging="product"),
        ]
        pairs.append(LowRankPair(a, b, scaling, fan_in_fan_out=layer == "v"))
    tensors += [TensorSpec("head", (3, 4), dtype=dtype, role="head"), TensorSpec("bias", (3,), dtype=dtype)]
    return AdapterSpec("lora", tuple(tensors), tuple(pairs), rank=rank, alpha=scaling * rank)


@dataclass(frozen=True)
class Bench:
    """What the tests of this folder share."""

    spec: AdapterSpec

    def state(self, seed: int, scale: float = 1.0, spec: AdapterSpec | None = None) -> AdapterState:
        spec, random = spec or self.spec, np.random.default_rng(seed)
        return AdapterState(
            spec, {t.name: (scale * random.standard_normal(t.shape)).astype(t.dtype) for t in spec.tensors}
        )

    def start(self) -> AdapterState:
        return self.state(99)

    def near(self, start: AdapterState, seed: int, step: float = 0.1) -> AdapterState:
        return start + self.state(seed, step, start.spec)

    def sent(self, count: int = 10, spec: AdapterSpec | None = None, drift: float = 0.3) -> list[AdapterState]:
        """Updates that share a drift and differ by chance."""
        start = self.start() if spec is None else self.state(99, spec=spec)
        common = self.state(7, drift, start.spec)
        return [self.near(start + common, seed) for seed in range(count)]

    @staticmethod
    def dense(state: AdapterState) -> np.ndarray:
        """All effective weights of an adapter in one vector: each dW whole, then the other tensors."""
        factors = {name for pair in state.spec.pairs for name in (pair.a, pair.b)}
        parts = [state.delta(pair).ravel() for pair in state.spec.pairs]
        parts += [state[name].astype(np.float64).ravel() for name in state if name not in factors]
        return np.concatenate(parts)

    def aggregate(
        self,
        rule: str | Aggregator,
        states: Sequence[AdapterState],
        start: AdapterState | None = None,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> AdapterState:
        aggregator = create_aggregator(rule, options) if isinstance(rule, str) else rule
        aggregator.start_round(start if start is not None else self.start())
        for number, state in enumerate(states):
            weight = 1.0 if weights is None else weights[number]
            aggregator.add(Update(f"site-{number:02d}", state, weight))
        return aggregator.result()

    @staticmethod
    def close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], rtol: float = 1e-12) -> None:
        assert tuple(got) == tuple(want)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.fixture
def bench() -> Bench:
    return Bench(make_spec())


@pytest.fixture
def specs() -> Callable[..., AdapterSpec]:
    """``specs(dtype, rank, scaling)``: the description of the small adapter."""
    return make_spec


@pytest.fixture
def gauged() -> Callable[[AdapterState, int], AdapterState]:
    """``gauged(state, seed)``: the same dW by other factors, B Q and Q^T A, Q orthogonal."""

    def turn(state: AdapterState, seed: int) -> AdapterState:
        random, values = np.random.default_rng(seed), dict(state)
        for pair in state.spec.pairs:
            q = np.linalg.qr(random.standard_normal((state[pair.a].shape[0],) * 2))[0]
            values[pair.b] = (state[pair.b] @ q).astype(state[pair.b].dtype)
            values[pair.a] = (q.T @ state[pair.a]).astype(state[pair.a].dtype)
        return AdapterState(state.spec, values)

    return turn
