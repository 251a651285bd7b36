"""Soups against dense means, PEFT's exact combinations, and the published greedy recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.strategies.merging import Adapter, Context, create_merger
from fedgraft.strategies.merging.mixing import common_spec


def test_the_uniform_soup_is_the_mean_of_the_dense_changes(zoo: Any, weights: Any) -> None:
    adapters = zoo.mixed()
    merged = zoo.merge("uniform", adapters, 9)
    p, dense = weights(adapters), [zoo.dense(x.state) for x in adapters]
    zoo.close(zoo.dense(merged.state), {k: np.tensordot(p, [d[k] for d in dense], 1) for k in dense[0]})
    assert list(merged.weights.values()) == pytest.approx(p)
    assert merged.lost == 0.0


def test_the_mean_of_factors_is_another_thing(zoo: Any, weights: Any) -> None:
    adapters = [zoo.adapter("north", 1), zoo.adapter("south", 2, weight=3.0, alpha=2.0)]
    merged = zoo.merge("uniform", adapters, on="factors")
    p, (first, second) = weights(adapters), (x.state for x in adapters)
    want = {}
    for pair, other in zip(first.spec.pairs, second.spec.pairs, strict=True):
        b = p[0] * pair.scaling * first[pair.b] + p[1] * other.scaling * second[pair.b]
        want[pair.a.partition(".")[0]] = b @ (p[0] * first[pair.a] + p[1] * second[pair.a])
    zoo.close(zoo.dense(merged.state), want)
    exact = zoo.dense(zoo.merge("uniform", adapters, 6).state)
    assert np.linalg.norm(exact["up"] - want["up"]) > 0.3 * np.linalg.norm(exact["up"])


def test_factors_of_mixed_ranks_have_no_mean(zoo: Any) -> None:
    with pytest.raises(UserError, match=r"adapter north: has rank 2 at up.*leave out on = factors"):
        zoo.merge("uniform", zoo.mixed(), on="factors")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("way", "rank"), [("cat", None), ("svd", 8), ("svd", 4)])
def test_peft_computes_the_same_where_it_is_right(family: str, way: str, rank: int | None, lab: Any) -> None:
    """PEFT's `cat` and `svd` on both layouts; its `linear` is not the weighted change, and by how much."""
    target = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[family]
    base = lab.base(family, "sequence-classification").model
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=target), "one")
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=20, target_modules=target))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.base_model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "both", way, svd_rank=rank)
    model.base_model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "linear", "linear")
    adapters = [Adapter(n, _of(model, n), w) for n, w in (("one", 1.0), ("two", 3.0))]
    spec = common_spec(adapters, rank or 8)
    merged = create_merger("uniform").merge(adapters, Context(spec))
    apart = whole = linear = 0.0
    modules = dict(model.named_modules())
    for pair in merged.state.spec.pairs:
        module: Any = modules[pair.a.partition(".lora_A.")[0]]
        ours = merged.state.delta(pair)
        exact = sum(
            w * x.state.delta(p)
            for w, x in zip((0.25, 0.75), adapters, strict=True)
            for p in x.state.spec.pairs
            if p.a == pair.a
        )
        theirs = module.get_delta_weight("both").detach().numpy()
        apart += float(np.sum((ours - (theirs.T if pair.fan_in_fan_out else theirs)) ** 2))
        rough = module.get_delta_weight("linear").detach().numpy()
        linear += float(np.sum((exact - (rough.T if pair.fan_in_fan_out else rough)) ** 2))
        whole += float(np.sum(exact**2))
    assert np.sqrt(apart / whole) < 1e-5
    assert (merged.lost < 1e-6) == (rank != 4)
    assert np.sqrt(linear / whole) > 0.3


def _of(model: peft.PeftModel, adapter: str) -> AdapterState:
    tensors, pairs, arrays = [], [], {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
            arrays[a], arrays[b] = (x[adapter].weight.detach().numpy() for x in (module.lora_A, module.lora_B))
            tensors += [TensorSpec(n, arrays[n].shape, role="lora") for n in (a, b)]
            pairs.append(LowRankPair(a, b, module.scaling[adapter], bool(module.fan_in_fan_out)))
    config: Any = model.peft_config[adapter]
    return AdapterState(AdapterSpec("lora", tuple(tensors), tuple(pairs), config.r, config.lora_alpha), arrays)


def test_the_greedy_soup_follows_the_published_recipe(zoo: Any, weights: Any) -> None:
    """Against a loop over dense means, with a score that some adapters raise and some lower."""
    adapters = [zoo.adapter(f"site-{i}", i, 2, weight=1.0 + i % 2) for i in range(6)]
    dense = [zoo.dense(x.state)["up"] for x in adapters]
    goal = 0.5 * dense[1] + 0.4 * dense[4] + 0.3 * dense[0]

    def score_of(up: np.ndarray) -> float:
        return -float(np.linalg.norm(up - goal))

    merged = zoo.merge(
        "greedy", adapters, 12, context={"score": lambda state: score_of(zoo.dense(state)["up"]), "labels": 9}
    )

    def mean(members: list[int]) -> np.ndarray:
        w = np.array([adapters[i].weight for i in members])
        return np.tensordot(w / w.sum(), [dense[i] for i in members], 1)

    order = sorted(range(6), key=lambda i: -score_of(dense[i]))
    soup = [order[0]]
    for i in order[1:]:
        if score_of(mean([*soup, i])) >= score_of(mean(soup)):
            soup.append(i)
    assert 1 < len(soup) < 6
    np.testing.assert_allclose(zoo.dense(merged.state)["up"], mean(soup), atol=1e-10)
    assert {name for name, weight in merged.weights.items() if weight} == {f"site-{i}" for i in soup}
    assert sum(merged.weights.values()) == pytest.approx(1.0)
    assert merged.reasons[f"site-{order[0]}"].startswith("best alone")
    assert all(("joined" in merged.reasons[f"site-{i}"]) == (i in soup) for i in order[1:])


def test_an_adapter_that_changes_no_score_joins(zoo: Any) -> None:
    merged = zoo.merge("greedy", zoo.alike(), context={"score": lambda state: 0.5, "labels": 9})
    assert merged.weights == pytest.approx({"north": 0.2, "south": 0.6, "west": 0.2})


def test_every_state_that_is_scored_has_the_description_of_the_result(zoo: Any) -> None:
    seen = []
    zoo.merge("greedy", zoo.mixed(), context={"score": lambda state: seen.append(state.spec) or 0.0, "labels": 9})
    assert len(seen) == 5 and set(map(id, seen)) and all(spec == common_spec(zoo.mixed()) for spec in seen)


def test_a_greedy_soup_without_records_is_refused(zoo: Any) -> None:
    with pytest.raises(UserError, match="rule `greedy` scores adapters"):
        zoo.merge("greedy", zoo.alike())
