"""Sections add up, cost nothing while no profile is on, and little while one is."""

from __future__ import annotations

import time

import pytest

from fedgraft.core import profile as module
from fedgraft.core.profile import SECTIONS, Profile, current, profiling, section


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_section_within_another_is_taken_off_it(clock: Clock) -> None:
    with profiling(Profile()) as profile:
        with section("evaluation"):
            clock.now += 2
            with section("data"):
                clock.now += 3
                with section("disk"):
                    clock.now += 10
                clock.now += 1
            with section("data"):
                clock.now += 5
            clock.now += 0.5
        with section("data"):
            clock.now += 7
    assert profile.taken() == {
        "evaluation": {"seconds": 2.5, "calls": 1},
        "data": {"seconds": 16.0, "calls": 3},
        "disk": {"seconds": 10.0, "calls": 1},
    }
    assert profile.taken() == {}, "what was taken is told twice"


def test_a_section_that_breaks_off_counts_and_spoils_no_other(clock: Clock) -> None:
    with profiling(Profile()) as profile:
        with pytest.raises(ValueError, match="broken"), section("forward"):
            clock.now += 1
            with section("data"):
                clock.now += 2
                raise ValueError("broken")
        with section("forward"):
            clock.now += 4
    assert {name: told["seconds"] for name, told in profile.taken().items()} == {"forward": 5.0, "data": 2.0}


def test_what_other_processes_measured_is_added() -> None:
    profile = Profile()
    profile.add("forward", 1.5, 3)
    profile.add("forward", 2.0, 4)
    assert profile.taken() == {"forward": {"seconds": 3.5, "calls": 7}}


def test_nothing_is_measured_while_no_profile_is_on(clock: Clock) -> None:
    with section("forward"):
        clock.now += 1
    assert current() is None
    with profiling(Profile()) as profile:
        assert current() is profile
    with section("forward"):
        clock.now += 1
    assert profile.taken() == {}


def test_what_a_gpu_was_given_to_do_is_waited_for(clock: Clock) -> None:
    """The kernels of a section end within it: here they take two seconds each, and nobody waits for them but this."""
    queued: list[str] = []

    def synchronize() -> None:
        clock.now += 2 * len(queued)
        queued.clear()

    queued.append("before")
    with profiling(Profile(synchronize)) as profile, section("forward"):
        queued.extend(["one", "two"])
    assert profile.taken() == {"forward": {"seconds": 4.0, "calls": 1}}
    queued.append("after")
    with section("forward"):
        pass
    assert queued == ["after"], "no profile is on, and still the GPU was waited for"


def _each(count: int) -> float:
    """Seconds of an empty section, the least of five rounds: others run on the machine too."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            with section("forward"):
                pass
        best = min(best, (time.perf_counter() - began) / count)
    return best


def test_a_section_costs_next_to_nothing() -> None:
    """A step has about ten: below 2 % of one of 3 ms while none is on, below 5 % of it while one is."""
    assert 10 * _each(20_000) < 0.02 * 3e-3
    with profiling(Profile()):
        assert 10 * _each(5_000) < 0.05 * 3e-3


def test_every_section_has_a_name_of_its_own() -> None:
    assert len(set(SECTIONS)) == len(SECTIONS)
