"""Strategies are found by name, built in or from an installed package, and their options are checked."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator, strategies, strategy
from fedgraft.strategies import aggregator as registry
from fedgraft.strategies.averaging import FedIT
from fedgraft.strategies.frozen_factor import FFA


class Last(Aggregator):
    """What a plugin author writes: the last update wins."""

    class Options(registry.Options):
        keep: int = 1

    def add(self, update: Update) -> None:
        self.state = update.state

    def result(self) -> AdapterState:
        return self.state


NOT_A_STRATEGY = 7


class _Plugins:
    """Stands in for what other installed packages offer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[EntryPoint] = []
        self.loaded: list[str] = []
        monkeypatch.setattr(registry, "_STRATEGIES", dict(registry._STRATEGIES))
        monkeypatch.setattr(registry, "entry_points", self._offer)

    def _offer(self, *, group: str) -> list[EntryPoint]:
        assert group == "fedgraft.strategies"
        return self.entries

    def add(self, name: str, thing: Any) -> None:
        loaded = self.loaded

        class Entry(EntryPoint):
            def load(self) -> Any:
                loaded.append(self.name)
                if isinstance(thing, Exception):
                    raise thing
                return thing

        self.entries.append(Entry(name, f"some_package:{name}", "fedgraft.strategies"))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> _Plugins:
    return _Plugins(monkeypatch)


def test_the_built_in_strategies_are_there_and_described() -> None:
    found = strategies()
    assert list(found) == sorted(found)
    assert found["fedit"] is FedIT and found["ffa"] is FFA
    for name, cls in found.items():
        assert cls.name == name and cls.summary and cls.source


def test_a_strategy_is_made_by_name_with_its_options() -> None:
    assert type(create_aggregator("fedit")) is FedIT
    assert create_aggregator("ffa").options.basis == "orthonormal"
    assert create_aggregator("ffa", {"basis": "random"}).options.basis == "random"
    assert FFA().options.basis == "orthonormal"


@pytest.mark.parametrize(("name", "meant"), [("fedti", "fedit"), ("FedIT", "fedit"), ("ff-a", "ffa"), ("FFA", "ffa")])
def test_an_unknown_strategy_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_aggregator(name)
    assert str(refusal.value) == f"unknown strategy `{name}`; did you mean `{meant}`?"


def test_a_strategy_like_no_other_lists_them_all() -> None:
    with pytest.raises(UserError, match=r"unknown strategy `zzz`; there are .*fedit.*ffa"):
        create_aggregator("zzz")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "ffa",
            {"basiss": "random"},
            "strategy_options.basiss: strategy `ffa` has no such option; did you mean `basis`?",
        ),
        ("ffa", {"zzz": 1}, "strategy_options.zzz: strategy `ffa` has no such option; there are basis"),
        ("fedit", {"lr": 1.0}, "strategy_options.lr: strategy `fedit` has no such option; it has none"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_aggregator(name, options)
    assert str(refusal.value) == says


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        create_aggregator("ffa", {"basis": "diagonal"})
    text = str(refusal.value)
    assert text.startswith("strategy_options.basis: ") and "'orthonormal'" in text and "`ffa`" in text


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        create_aggregator("ffa").options.basis = "random"


def test_a_plugin_is_found_by_the_name_of_its_entry_point(plugins: _Plugins) -> None:
    plugins.add("last", Last)
    rule = create_aggregator("last", {"keep": 3})
    assert type(rule) is Last and rule.name == "last" and rule.options.keep == 3
    spec = AdapterSpec(method="m", tensors=(TensorSpec("x", (1,)),))
    states = [AdapterState(spec, {"x": np.array([v], np.float32)}) for v in (1.0, 2.0)]
    rule.start_round(states[0])
    for state in states:
        rule.add(Update("s", state, 1.0))
    assert rule.result() == states[1]
    assert rule.prepare(states[0]) is states[0] and rule.for_site(states[0], "s") is states[0]
    assert rule.memory() == {}
    assert strategies()["last"] is Last
    assert plugins.loaded == ["last"]
    with pytest.raises(UserError, match="unknown strategy `lsat`; did you mean `last`"):
        create_aggregator("lsat")


def test_a_plugin_with_a_fault_harms_only_who_asks_for_it(plugins: _Plugins) -> None:
    plugins.add("broken", ImportError("no module named nothing\nat all"))
    plugins.add("last", Last)
    assert type(create_aggregator("fedit")) is FedIT
    assert type(create_aggregator("last")) is Last
    assert plugins.loaded == ["last"]
    for use in (lambda: create_aggregator("broken"), strategies):
        with pytest.raises(UserError) as refusal:
            use()
        assert "\n" not in str(refusal.value)
        assert "strategy `broken` of the package some_package:broken cannot be loaded: ImportError: no module" in str(
            refusal.value
        )


@pytest.mark.parametrize("thing", [NOT_A_STRATEGY, dict, Last()])
def test_a_plugin_that_is_no_strategy_is_refused(plugins: _Plugins, thing: Any) -> None:
    plugins.add("odd", thing)
    with pytest.raises(UserError, match="some_package:odd is not a subclass of Aggregator"):
        create_aggregator("odd")


def test_a_plugin_does_not_replace_a_built_in_strategy(plugins: _Plugins) -> None:
    plugins.add("fedit", Last)
    assert type(create_aggregator("fedit")) is FedIT
    assert strategies()["fedit"] is FedIT
    assert plugins.loaded == []


def test_a_plugin_that_registers_itself_when_imported_is_fine(plugins: _Plugins) -> None:
    strategy("last")(Last)
    strategy("last")(Last)
    plugins.add("last", Last)
    assert type(create_aggregator("last")) is Last


def test_a_name_is_taken_once(plugins: _Plugins) -> None:
    with pytest.raises(ValueError, match="a strategy called fedit is registered already"):
        strategy("fedit")(Last)
    # Also against a class of the same name from elsewhere.
    impostor = type("FedIT", (Last,), {"__qualname__": "FedIT"})
    with pytest.raises(ValueError, match="a strategy called fedit is registered already"):
        strategy("fedit")(impostor)
    assert strategies()["fedit"] is FedIT


def test_a_strategy_without_a_rule_cannot_be_made() -> None:
    class Empty(Aggregator):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()  # type: ignore[abstract]
