"""What a low-rank pair claims (scaling, layout, which A belongs to which B) is what the model computes when merged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

TEXT, IMAGE = "sequence-classification", "image-classification"
FAMILIES = [("bert", TEXT), ("roberta", TEXT), ("gpt2", TEXT), ("llama", TEXT), ("t5", TEXT), ("vit", IMAGE)]


@pytest.mark.parametrize(("family", "task"), FAMILIES)
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 10.0), (9, 3.5)])
def test_a_pairs_delta_is_what_merging_adds_to_the_weight(
    lab: Any, family: str, task: str, method: str, rank: int, alpha: float
) -> None:
    adapter = lab.attach(family, task, method, rank=rank, alpha=alpha)
    state = lab.shaken(adapter)
    want = alpha / (math.sqrt(rank) if method == "rslora" else rank)
    assert adapter.spec.rank == rank and adapter.spec.alpha == alpha
    assert [pair.scaling for pair in state.spec.pairs] == pytest.approx([want] * len(state.spec.pairs), rel=1e-12)
    assert {pair.fan_in_fan_out for pair in state.spec.pairs} == {family == "gpt2"}

    base = {name: p.detach().double().numpy() for name, p in lab.base(family, task).model.named_parameters()}
    adapter.model.double()
    merged = {n: p.detach().numpy() for n, p in adapter.model.merge_and_unload().named_parameters()}
    moved = {name for name in base if name in merged and not np.array_equal(base[name], merged[name])}
    for pair in state.spec.pairs:
        layer = pair.a.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        assert pair.b == pair.a.replace("lora_A", "lora_B")
        a, b = state[pair.a], state[pair.b]
        assert a.shape[0] == b.shape[1] == rank
        delta = state.delta(pair)
        # The naive twin, written out.
        naive = np.zeros((b.shape[0], a.shape[1]))
        for r in range(rank):
            naive += want * np.outer(b[:, r].astype(float), a[r].astype(float))
        assert np.allclose(delta, naive, rtol=1e-12, atol=1e-14)
        got = merged[f"{layer}.weight"] - base[f"{layer}.weight"]
        stored = delta.T if pair.fan_in_fan_out else delta
        assert got.shape == stored.shape
        assert np.abs(got - stored).max() <= 1e-12
        moved.discard(f"{layer}.weight")
    assert {name for name in moved if "classifier" not in name and "score" not in name and "head" not in name} == set()


def test_every_factor_belongs_to_one_pair(lab: Any) -> None:
    spec = lab.attach("t5", TEXT, "lora").spec
    factors = [t.name for t in spec.tensors if t.role in ("lora_A", "lora_B")]
    paired = [name for pair in spec.pairs for name in (pair.a, pair.b)]
    assert sorted(paired) == sorted(factors)
    # Encoder self, decoder self and decoder cross attention, query and value, two layers each.
    assert len(spec.pairs) == 12


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_factors_multiply_and_do_not_average(lab: Any, method: str) -> None:
    spec = lab.attach("bert", TEXT, method).spec
    kinds = {t.role: t.averaging for t in spec.tensors}
    assert kinds["lora_A"] == kinds["lora_B"] == "product"
    assert kinds["head"] == "nonlinear"
    assert kinds.get("magnitude", "nonlinear") == "nonlinear"


@pytest.mark.parametrize(("method", "role"), [("bitfit", "bias"), ("ln", "norm"), ("ia3", "scale")])
def test_vectors_average_linearly(lab: Any, method: str, role: str) -> None:
    spec = lab.attach("bert", TEXT, method).spec
    assert {t.role: t.averaging for t in spec.tensors} == {role: "linear", "head": "nonlinear"}
    assert spec.pairs == () and spec.rank is None and spec.alpha is None


def test_a_fresh_adapter_leaves_the_function_of_the_model_as_it_is(lab: Any) -> None:
    for method in ("lora", "rslora", "dora", "bitfit", "ia3", "ln"):
        base = lab.base("bert", TEXT).model
        batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, (3, 9, 1)))
        with torch.no_grad():
            plain = lab.losses(base, batch)
            adapted = lab.losses(lab.attach("bert", TEXT, method).model, batch)
        assert float((plain - adapted).abs().max()) <= 1e-5, method
