"""What stands around a rule hands on everything that it leaves alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies.aggregator import Aggregator, Capabilities, Options
from fedgraft.strategies.local import LocalRule, Training
from fedgraft.strategies.wrapping import Wrapper

SPEC = AdapterSpec("m", (TensorSpec("x", (2,)),))
STATE = AdapterState(SPEC, {"x": np.ones(2, np.float32)})


class Recorder(Aggregator):
    """Answers every call with something of its own, and writes it down."""

    name = "recorder"
    summary = "writes down"
    equation = "x = x"
    source = "here"
    capabilities = Capabilities(two_passes=True)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.recalled: Mapping[str, AdapterState] = {}

    def _note(self, name: str, *arguments: Any) -> AdapterState:
        self.calls.append((name, arguments))
        return AdapterState(SPEC, {"x": np.full(2, len(self.calls), np.float32)})

    def prepare(self, initial: AdapterState) -> AdapterState:
        return self._note("prepare", initial)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return self._note("for_site", state, site)

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule | None:
        self._note("local", training, memory)
        return LocalRule(training, memory)

    def warning(self, private: bool) -> str:
        self._note("warning", private)
        return "mind the gap"

    def start_round(self, state: AdapterState) -> None:
        self._note("start_round", state)

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        self._note("asked", sites)
        return sites[:1]

    def add(self, update: Update) -> None:
        self._note("add", update)

    def second_pass(self) -> AdapterState | None:
        return self._note("second_pass")

    def add_refined(self, update: Update) -> None:
        self._note("add_refined", update)

    def result(self) -> AdapterState:
        return self._note("result")

    def memory(self) -> Mapping[str, AdapterState]:
        return {"own": STATE}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        self.recalled = memory


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "prepare": (STATE,),
    "for_site": (STATE, "east"),
    "local": (Training("east", 1, 2, 0.1), {}),
    "warning": (True,),
    "start_round": (STATE,),
    "asked": (("east", "north"),),
    "add": (Update("east", STATE, 1.0),),
    "second_pass": (),
    "add_refined": (Update("east", STATE, 1.0),),
    "result": (),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_call_reaches_the_rule_inside_and_its_answer_comes_back(name: str) -> None:
    direct, inner = Recorder(), Recorder()
    want, got = getattr(direct, name)(*ARGUMENTS[name]), getattr(Wrapper(Wrapper(inner)), name)(*ARGUMENTS[name])
    assert inner.calls == direct.calls == [(name, ARGUMENTS[name])]
    assert type(got) is type(want) and (isinstance(got, LocalRule) or got == want)


def test_no_call_of_the_seam_is_left_out() -> None:
    seam = {name for name, _ in inspect.getmembers(Aggregator, inspect.isfunction) if not name.startswith("_")}
    assert seam == {*ARGUMENTS, "memory", "recall"}
    assert seam <= set(vars(Wrapper))


def test_it_declares_what_the_rule_inside_declares() -> None:
    class Some(Options):
        depth: int = 2

    inner = Recorder(Some(depth=5))
    wrapped = Wrapper(inner)
    for name in ("name", "summary", "equation", "source", "capabilities", "options"):
        assert getattr(wrapped, name) == getattr(inner, name)
    assert wrapped.options.depth == 5
    assert Wrapper.capabilities == Capabilities() and Wrapper.name == "", "the class itself declares nothing"


def test_what_is_set_from_outside_reaches_the_rule_inside_and_is_not_forgotten() -> None:
    inner = Recorder()
    inner.round = 7
    wrapped = Wrapper(Wrapper(inner))
    assert wrapped.round == 7
    wrapped.round, wrapped.ranks, wrapped.score, wrapped.principal = 8, {"east": 2}, AdapterState.norm, dict
    for rule in (inner, wrapped):
        assert (rule.round, rule.ranks, rule.score, rule.principal) == (8, {"east": 2}, AdapterState.norm, dict)


def test_memories_of_nested_rules_do_not_mix() -> None:
    class Remembering(Wrapper):
        def __init__(self, inner: Aggregator, fill: float) -> None:
            super().__init__(inner)
            self.kept = AdapterState(SPEC, {"x": np.full(2, fill, np.float32)})

        def own_memory(self) -> Mapping[str, AdapterState]:
            return {"own": self.kept}

        def own_recall(self, memory: Mapping[str, AdapterState]) -> None:
            self.kept = memory["own"]

    outer = Remembering(Remembering(Recorder(), 2.0), 3.0)
    again = Remembering(Remembering(Recorder(), 0.0), 0.0)
    again.recall(outer.memory())
    assert again.kept["x"][0] == 3.0
    assert isinstance(again.inner, Remembering) and again.inner.kept["x"][0] == 2.0
    assert isinstance(again.inner.inner, Recorder) and dict(again.inner.inner.recalled) == {"own": STATE}
