"""What holds for every rule: names and options, one adapter is itself, no order matters where none is stated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.errors import UserError
from fedgraft.strategies.merging import Context, create_merger, mergers
from fedgraft.strategies.merging.mixing import common_spec

#: Rules whose answer may hang on which adapter is first.
ORDERED = {"mera"}
#: Rules that search or select by the made-up statistics, which another test file compares.
OWN_ROOM = {"lorahub", "adaptersoup"}
RULES = sorted(set(mergers()) - OWN_ROOM)


def test_every_rule_says_what_it_is() -> None:
    assert {"uniform", "greedy", "task-arithmetic", "ties", "dare", "knots", "fisher", "regmean", "mera"} <= set(
        mergers()
    )
    for name, cls in mergers().items():
        assert cls.name == name and cls.summary and cls.equation and "arXiv" in cls.source
        assert all(entry.description for entry in cls.Options.model_fields.values()), name


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tise", {}, "unknown merging rule `tise`; did you mean `ties`?"),
        ("ties", {"densty": 0.1}, "rule `ties` has no option `densty`; did you mean `density`?"),
        ("ties", {"density": 0}, "option `density` of rule `ties`"),
        ("ties", {"density": "much"}, "option `density` of rule `ties`"),
        ("mera", {"density": 0.1}, "rule `mera` has no option `density`; it has none"),
        ("dare", {"on": "rows"}, "option `on` of rule `dare`"),
    ],
)
def test_a_name_or_option_that_is_none_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_merger(name, options)
    assert str(refusal.value).startswith(says)


@pytest.mark.parametrize("rule", RULES)
def test_one_adapter_comes_back_as_itself(rule: str, zoo: Any) -> None:
    adapter = zoo.adapter("north", 1, 3, weight=7.0)
    merged = zoo.merge(rule, [adapter], context=zoo.every_need([adapter]))
    zoo.close(zoo.dense(merged.state), zoo.dense(adapter.state), 1e-14)
    assert np.array_equal(merged.state["head.weight"], adapter.state["head.weight"])
    assert merged.weights == {"north": 1.0} and merged.lost == 0.0 and merged.reasons["north"]


@pytest.mark.parametrize("rule", RULES)
def test_equal_adapters_merge_into_themselves(rule: str, zoo: Any) -> None:
    """With nothing to resolve, no rule may change the direction of the change; sums and trims change its size."""
    first = zoo.adapter("north", 1, 2)
    adapters = [first, zoo.adapter("south", 1, 2)]
    options = {
        "task-arithmetic": {"scale": 0.5},
        "ties": {"density": 1.0},
        "knots": {"density": 1.0},
        "dare": {"density": 1.0},
    }
    merged = zoo.merge(rule, adapters, context=zoo.every_need(adapters), **options.get(rule, {}))
    zoo.close(zoo.dense(merged.state), zoo.dense(first.state), 1e-9)
    np.testing.assert_allclose(merged.state["head.weight"], first.state["head.weight"], rtol=1e-12)


@pytest.mark.parametrize("rule", sorted(set(RULES) - ORDERED))
def test_the_order_of_adapters_does_not_matter(rule: str, zoo: Any) -> None:
    adapters = zoo.alike()
    need = zoo.every_need(adapters)
    spec = common_spec(adapters)
    one, other = (
        create_merger(rule).merge(order, Context(spec, **need))
        for order in (adapters, [adapters[i] for i in (2, 0, 1)])
    )
    zoo.close(zoo.dense(one.state), zoo.dense(other.state), 1e-8)
    assert one.weights == pytest.approx(other.weights, abs=1e-12)
    assert one.lost == pytest.approx(other.lost, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_every_adapter_gets_a_weight_and_a_reason(rule: str, zoo: Any) -> None:
    adapters = zoo.alike()
    merged = zoo.merge(rule, adapters, context=zoo.every_need(adapters))
    names = [adapter.name for adapter in adapters]
    assert list(merged.weights) == names and list(merged.reasons) == names
    assert all(merged.reasons.values()) and max(merged.weights.values()) > 0
    assert merged.state.spec == common_spec(adapters)


@pytest.mark.parametrize("rule", sorted({"task-arithmetic", "ties", "dare", "knots", "mera", "regmean"}))
def test_adapters_without_factors_are_refused_where_a_rule_needs_them(rule: str, zoo: Any) -> None:
    adapters = [zoo.adapter("north", 1, layers=[]), zoo.adapter("south", 2, layers=[])]
    with pytest.raises(UserError, match=f"rule `{rule}` works on low-rank updates; lora has none"):
        zoo.merge(rule, adapters)
    state = zoo.merge("uniform", adapters).state
    np.testing.assert_allclose(
        state["head.weight"], (adapters[0].state["head.weight"] + adapters[1].state["head.weight"]) / 2
    )


@pytest.mark.parametrize("rule", ["uniform", "task-arithmetic", "ties", "dare", "knots"])
def test_the_layout_of_the_stored_weight_changes_nothing(rule: str, zoo: Any) -> None:
    """A and B are those of x W^T in either layout: conv and a plain layer of its shape merge alike."""
    adapters = zoo.alike()
    flat = []
    for adapter in adapters:
        spec = adapter.state.spec
        spec = replace(spec, pairs=tuple(replace(pair, fan_in_fan_out=False) for pair in spec.pairs))
        flat.append(replace(adapter, state=adapter.state.with_spec(spec)))
    one, other = zoo.merge(rule, adapters), zoo.merge(rule, flat)
    assert all(np.array_equal(one.state[name], other.state[name]) for name in one.state)
    assert [pair.fan_in_fan_out for pair in one.state.spec.pairs] == [False, False, True]
