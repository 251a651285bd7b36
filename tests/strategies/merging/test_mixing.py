"""What the rules share: shares, one description for mixed ranks, exact weighted sums, and what cannot be merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.strategies.merging import Context
from fedgraft.strategies.merging.mixing import common_spec, fitted, lifted, shares, weighted, with_ranks


def test_shares_are_the_weights_over_their_sum(zoo: Any) -> None:
    assert shares(zoo.mixed()) == pytest.approx({"north": 1 / 4.5, "south": 3 / 4.5, "west": 0.5 / 4.5})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(zoo: Any, weight: float) -> None:
    with pytest.raises(UserError, match=r"adapter north: its weight is"):
        shares([zoo.adapter("north", 1, weight=weight)])


def test_nothing_and_one_name_twice_are_refused(zoo: Any) -> None:
    with pytest.raises(UserError, match="no adapter"):
        shares([])
    with pytest.raises(UserError, match="two adapters are called north"):
        shares([zoo.adapter("north", 1), zoo.adapter("north", 2)])


def test_the_common_description_has_the_largest_rank_and_the_first_scaling_rule(zoo: Any) -> None:
    spec = common_spec(zoo.mixed())
    assert spec.rank == 4 and spec.alpha == 8.0
    assert all(pair.scaling == 8.0 / 4 for pair in spec.pairs)
    root = common_spec([zoo.adapter("west", 3, 3, alpha=5.0, root=True), zoo.adapter("north", 1, 4)])
    assert all(pair.scaling == pytest.approx(5.0 / 2, rel=1e-15) for pair in root.pairs)
    assert common_spec(zoo.mixed(), 9).by_name["up.lora_A.default.weight"].shape == (9, 7)
    with pytest.raises(UserError, match="at least 1"):
        common_spec(zoo.mixed(), 0)


def test_scaling_at_another_rank_is_what_the_method_itself_has_there(zoo: Any) -> None:
    """Bit for bit, or an adapter would not be taken for one of a run's own."""
    for root in (False, True):
        for rank in (1, 3, 6, 7, 12):
            spec = with_ranks(zoo.spec(5, 7.0, root=root), {pair.a: rank for pair in zoo.spec(5).pairs})
            assert spec == zoo.spec(rank, 7.0, root=root)


def test_a_layer_that_only_one_adapter_changes_counts_as_no_change_of_the_others(zoo: Any) -> None:
    adapters = [zoo.adapter("north", 1, layers=["up"]), zoo.adapter("south", 2, layers=["down", "up"], weight=3.0)]
    spec = common_spec(adapters)
    assert {pair.a for pair in spec.pairs} == {"up.lora_A.default.weight", "down.lora_A.default.weight"}
    state, lost = weighted(adapters, shares(adapters), Context(common_spec(adapters, 6)))
    first, second = (zoo.dense(x.state) for x in adapters)
    zoo.close(zoo.dense(state), {"up": first["up"] / 4 + second["up"] * 0.75, "down": second["down"] * 0.75})
    assert lost == 0.0


def test_a_weighted_sum_is_exact_where_the_rank_is_enough(zoo: Any) -> None:
    adapters, c = zoo.mixed(), {"north": 0.3, "south": 1.7, "west": 0.2}
    state, lost = weighted(adapters, c, Context(common_spec(adapters, 9)))
    dense = [zoo.dense(x.state) for x in adapters]
    zoo.close(zoo.dense(state), {k: sum(w * d[k] for w, d in zip(c.values(), dense, strict=True)) for k in dense[0]})
    assert lost == 0.0
    total = sum(c.values())
    head = sum(w / total * x.state["head.weight"] for w, x in zip(c.values(), adapters, strict=True))
    np.testing.assert_allclose(state["head.weight"], head, rtol=1e-14)


def test_what_a_smaller_rank_loses_is_the_singular_values_that_it_drops(zoo: Any) -> None:
    adapters = zoo.mixed()
    p = shares(adapters)
    state, lost = weighted(adapters, p, Context(common_spec(adapters, 2)))
    dense = [zoo.dense(x.state) for x in adapters]
    exact = {k: sum(w * d[k] for w, d in zip(p.values(), dense, strict=True)) for k in dense[0]}
    zoo.close(zoo.dense(state), {k: zoo.cut(x, 2) for k, x in exact.items()})
    missed = sum(np.sum((zoo.cut(x, 2) - x) ** 2) for x in exact.values())
    assert lost == pytest.approx(np.sqrt(missed / sum(np.sum(x**2) for x in exact.values())), rel=1e-10)
    assert lost > 0.1


def test_only_the_change_since_a_common_start_is_weighted(zoo: Any) -> None:
    adapters, start = zoo.mixed(), zoo.adapter("start", 9, 2).state
    c = {"north": 0.3, "south": 1.7, "west": 0.2}
    state, _ = weighted(adapters, c, Context(common_spec(adapters, 11), start=start))
    zero, dense = zoo.dense(start), [zoo.dense(x.state) for x in adapters]
    want = {k: zero[k] + sum(w * (d[k] - zero[k]) for w, d in zip(c.values(), dense, strict=True)) for k in zero}
    zoo.close(zoo.dense(state), want)


def test_lifting_to_a_larger_rank_changes_no_digit_of_the_product(zoo: Any) -> None:
    state = zoo.mixed()[2].state
    larger = lifted(state, common_spec(zoo.mixed(), 8))
    zoo.close(zoo.dense(larger), zoo.dense(state), 1e-14)
    assert np.array_equal(larger["head.weight"], state["head.weight"])


def test_single_precision_adapters_come_back_bit_for_bit(zoo: Any) -> None:
    wide = zoo.adapter("north", 1, 3, alpha=5.0).state
    spec = replace(wide.spec, tensors=tuple(replace(t, dtype="float32") for t in wide.spec.tensors))
    state = AdapterState(spec, {name: array.astype(np.float32) for name, array in wide.items()})
    assert lifted(state, spec) == state


def test_factors_of_no_rank_and_of_zeros_fit(zoo: Any) -> None:
    (b, a), missed, whole = fitted(np.zeros((4, 0)), np.zeros((0, 5)), 2)
    assert b.shape == (4, 2) and a.shape == (2, 5) and missed == whole == 0 and not b.any() and not a.any()
    (b, a), missed, whole = fitted(np.zeros((4, 6)), np.ones((6, 5)), 2)
    assert missed == whole == 0 and not (b @ a).any()


def test_a_rank_above_the_sides_of_a_layer_is_filled_with_zeros(zoo: Any) -> None:
    adapters = zoo.mixed()
    state, lost = weighted(adapters, shares(adapters), Context(common_spec(adapters, 8)))  # 9 > 7, 6
    dense = [zoo.dense(x.state) for x in adapters]
    exact = {k: sum(w * d[k] for w, d in zip(shares(adapters).values(), dense, strict=True)) for k in dense[0]}
    zoo.close(zoo.dense(state), {"up": exact["up"], "down": exact["down"], "conv": zoo.cut(exact["conv"], 8)})
    assert 0 < lost < 0.2


def test_another_layer_is_refused_by_name(zoo: Any) -> None:
    first, other = zoo.adapter("north", 1), zoo.adapter("south", 2)
    tensors = tuple(
        replace(t, shape=(t.shape[0], 8)) if t.name == "up.lora_A.default.weight" else t
        for t in other.state.spec.tensors
    )
    spec = replace(other.state.spec, tensors=tensors)
    state = AdapterState(spec, {t.name: np.zeros(t.shape) for t in tensors})
    with pytest.raises(UserError, match=r"adapter south: tensor up.lora_A.* is for a layer of 8, another's of 7"):
        common_spec([first, replace(other, state=state)])


def test_another_head_is_refused_unless_the_first_is_kept(zoo: Any) -> None:
    adapters = [zoo.adapter("north", 1), zoo.adapter("south", 2, classes=4)]
    with pytest.raises(
        UserError, match=r"adapter south: tensor head.weight has shape \[4, 5\].*a head for other labels"
    ):
        common_spec(adapters)
    spec = common_spec(adapters, heads="first")
    state, _ = weighted(adapters, shares(adapters), Context(spec, heads="first"))
    assert np.array_equal(state["head.weight"], adapters[0].state["head.weight"])


def test_a_tensor_that_one_adapter_lacks_is_refused_by_name(zoo: Any) -> None:
    whole, other = zoo.adapter("north", 1), zoo.adapter("south", 2)
    spec = replace(other.state.spec, tensors=other.state.spec.tensors[:-1])
    bare = replace(other, state=AdapterState(spec, {name: other.state[name] for name in spec.names}))
    with pytest.raises(UserError, match=r"adapter south: has no tensor head.weight"):
        common_spec([whole, bare])
    with pytest.raises(UserError, match=r"adapter north: has a tensor head.weight, which the first adapter lacks"):
        common_spec([bare, whole])


def test_what_is_not_finite_is_refused(zoo: Any) -> None:
    adapters = zoo.alike()
    broken = adapters[1].state.map(lambda array: array * np.nan)
    with pytest.raises((NonFiniteError, np.linalg.LinAlgError)):
        weighted(
            [adapters[0], replace(adapters[1], state=broken)],
            {"north": 0.5, "south": 0.5},
            Context(common_spec(adapters, 6)),
        )
