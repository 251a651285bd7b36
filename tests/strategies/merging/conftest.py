"""Small adapters in float64 for the merging rules, and their changes as dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.strategies.merging import Adapter, Context, Merged, create_merger
from fedgraft.strategies.merging.mixing import common_spec

#: Layers as (m, n, stored transposed): tall, wide, and GPT-2's layout.
LAYERS: Mapping[str, tuple[int, int, bool]] = {"up": (11, 7, False), "down": (6, 13, False), "conv": (9, 12, True)}


class Zoo:
    """Makes adapters on three layers with a head, merges them, and says what they are as dense matrices."""

    layers = LAYERS

    @staticmethod
    def spec(
        rank: int, alpha: float = 8.0, layers: Sequence[str] = tuple(LAYERS), classes: int = 3, root: bool = False
    ) -> AdapterSpec:
        tensors: list[TensorSpec] = []
        pairs = []
        for layer in layers:
            m, n, flipped = LAYERS[layer]
            a, b = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
            tensors += [
                TensorSpec(a, (rank, n), "float64", "lora_A", "product"),
                TensorSpec(b, (m, rank), "float64", "lora_B", "product"),
            ]
            pairs.append(LowRankPair(a, b, alpha / (rank**0.5 if root else rank), flipped))
        tensors.append(TensorSpec("head.weight", (classes, 5), "float64", "head"))
        options = {"scaling": "sqrt"} if root else {}
        return AdapterSpec("rslora" if root else "lora", tuple(tensors), tuple(pairs), rank, alpha, options)

    @classmethod
    def adapter(cls, name: str, seed: int, rank: int = 3, weight: float = 1.0, **how: Any) -> Adapter:
        spec = cls.spec(rank, **how)
        draw = np.random.default_rng(seed)
        return Adapter(name, AdapterState(spec, {t.name: draw.standard_normal(t.shape) for t in spec.tensors}), weight)

    @classmethod
    def mixed(cls) -> list[Adapter]:
        """Three of different ranks, scalings and weights."""
        return [
            cls.adapter("north", 1, 2, 1.0),
            cls.adapter("south", 2, 4, 3.0, alpha=3.0),
            cls.adapter("west", 3, 3, 0.5, alpha=5.0, root=True),
        ]

    @classmethod
    def alike(cls) -> list[Adapter]:
        """Three of one rank and scaling."""
        return [cls.adapter("north", 1, weight=1.0), cls.adapter("south", 2, weight=3.0), cls.adapter("west", 3)]

    @staticmethod
    def merge(rule: str, adapters: Sequence[Adapter], rank: int | None = None, **how: Any) -> Merged:
        """Options of the rule by name; ``context`` is a mapping of further fields of the context."""
        context = Context(common_spec(adapters, rank), **how.pop("context", {}))
        return create_merger(rule, how).merge(adapters, context)

    @staticmethod
    def dense(state: AdapterState) -> dict[str, np.ndarray]:
        """dW by layer, the textbook product."""
        return {
            pair.a.partition(".")[0]: pair.scaling * state[pair.b].astype(float) @ state[pair.a].astype(float)
            for pair in state.spec.pairs
        }

    @staticmethod
    def close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], within: float = 1e-10) -> None:
        """Both are the same matrices, up to ``within`` of the largest entry."""
        assert got.keys() == want.keys()
        for name, matrix in want.items():
            assert np.abs(matrix).max() > 0
            np.testing.assert_allclose(got[name], matrix, rtol=0, atol=within * np.abs(matrix).max(), err_msg=name)

    @staticmethod
    def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
        """The nearest matrix of that rank (Eckart and Young)."""
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vt[:rank]

    @staticmethod
    def every_need(adapters: Sequence[Adapter]) -> dict[str, Any]:
        """Fields of a context with whatever any rule needs: made-up scores, statistics and embeddings."""
        draw = np.random.default_rng(0)

        def gram(name: str) -> dict[str, np.ndarray]:
            inputs = {layer: draw.standard_normal((50, n)) for layer, (_, n, _) in LAYERS.items()}
            return {f"{layer}.lora_A.default.weight": x.T @ x for layer, x in inputs.items()}

        rows = {adapter.name: draw.standard_normal((4, 6)) for adapter in adapters}
        units = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in rows.items()}
        return {
            "score": lambda state: -abs(state.norm() - 7.0),
            "loss": lambda state: abs(state.norm() - 7.0),
            "labels": 15,
            "embeddings": units,
            "texts": np.concatenate(list(units.values())),
            "fisher": {x.name: x.state.map(lambda array: draw.uniform(0.1, 2, array.shape)) for x in adapters},
            "grams": {x.name: gram(x.name) for x in adapters},
        }


@pytest.fixture
def zoo() -> type[Zoo]:
    return Zoo


@pytest.fixture
def weights() -> Callable[[Sequence[Adapter]], np.ndarray]:
    """The adapters' weights over their sum."""
    return lambda adapters: np.array([x.weight for x in adapters]) / sum(x.weight for x in adapters)
