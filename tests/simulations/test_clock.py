"""The virtual clock: what each site takes in closed form, who is late, and what a whole run would have taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.simulations import timekeeping
from fedgraft.simulations.chance import normal, uniform
from fedgraft.simulations.clock import Clock
from fedgraft.simulations.fate import Fates
from fedgraft.strategies.flower import Exchange, Phase


def _config(sites: list[Any], **simulation: Any) -> RunConfig:
    values = {"model": "m", "seed": 3, "server": {"quorum": 1}, "train": {"local_steps": 6}}
    return parse_config({**values, "data": {"path": "p", "sites": sites}, "simulation": simulation})


# One site


def test_a_site_takes_what_its_link_its_steps_and_its_speed_say() -> None:
    sites = [
        {"name": "fast", "speed": 4, "uplink": 2, "downlink": 50},
        {"name": "short", "speed": 1, "local_steps": 3},
    ]
    clock = Clock(_config(sites, seconds_per_step=0.5, seconds_per_evaluation=2, uplink=10, downlink=100, latency=0.25))
    # 10^6 bytes are 8 Mbit.
    assert clock.down("fast", 10**6).total == pytest.approx(0.25 + 8 / 50)
    assert clock.compute("fast", "train").total == pytest.approx(6 * 0.5 / 4)
    assert clock.compute("fast", "evaluate").total == pytest.approx(2 / 4)
    assert clock.up("fast", 10**6).total == pytest.approx(0.25 + 8 / 2)
    assert clock.down("short", 10**6).total == pytest.approx(0.25 + 8 / 100)
    assert clock.compute("short", "train").total == pytest.approx(3 * 0.5)
    assert clock.up("short", 10**6).total == pytest.approx(0.25 + 8 / 10)
    assert clock.compute("short", "hello").total == clock.compute("short", "refine").total == 0
    assert clock.deadline == 3600


def test_without_a_link_bytes_take_no_time_and_without_any_time_there_is_no_clock() -> None:
    clock = Clock(_config(["a"], seconds_per_step=1))
    assert clock.runs and clock.down("a", 10**12).total == clock.up("a", 10**12).total == 0
    assert not Clock(_config(["a", {"name": "b", "speed": 2, "straggler": True}], deadline=4)).runs
    assert Clock(_config([{"name": "a", "uplink": 1}])).runs


def test_speeds_and_links_are_drawn_log_normal_and_a_site_with_one_of_its_own_keeps_it() -> None:
    names: list[Any] = [f"s{number}" for number in range(2000)]
    config = _config(
        [*names, {"name": "own", "speed": 7, "uplink": 3}],
        seconds_per_step=1,
        speed_spread=0.5,
        uplink=8,
        downlink=8,
        link_spread=1.0,
    )
    clock = Clock(config)
    for values, sigma in (
        ([6 / clock.pace(name).training for name in names], 0.5),
        ([8 / (8 * 1e6 * clock.pace(name).up) for name in names], 1.0),
        ([8 / (8 * 1e6 * clock.pace(name).down) for name in names], 1.0),
    ):
        logs = np.log(values)
        assert abs(logs.mean()) < 4 * sigma / math.sqrt(2000)
        assert abs(logs.std() - sigma) < 4 * sigma / math.sqrt(4000)
    ups, downs = ([getattr(clock.pace(name), way) for name in names] for way in ("up", "down"))
    assert abs(np.corrcoef(np.log(ups), np.log(downs))[0, 1]) < 4 / math.sqrt(2000)
    assert (clock.pace("own").training, clock.pace("own").up) == (6 / 7, 8 / 3e6)
    # In another order, and without the others, the draws are the same.
    assert Clock(_config(["s7"], seconds_per_step=1, speed_spread=0.5)).pace("s7").training == clock.pace("s7").training


def test_chance_is_uniform_and_normal_and_hangs_on_nothing_but_what_it_is_about() -> None:
    drawn = np.array([uniform(1, "x", number) for number in range(5000)])
    assert drawn.min() > 0 and drawn.max() < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand.
    assert np.abs(np.sort(drawn) - (np.arange(5000) + 0.5) / 5000).max() < 1.95 / math.sqrt(5000)
    normals = np.array([normal(1, "x", number) for number in range(5000)])
    assert abs(normals.mean()) < 4 / math.sqrt(5000) and abs(normals.std() - 1) < 4 / math.sqrt(10000)
    assert uniform(1, "x", 2) == uniform(1, "x", 2) != uniform(2, "x", 2) != uniform(1, "y", 2)


def test_a_site_is_late_when_instruction_work_and_answer_take_longer_than_the_deadline() -> None:
    fates = Fates(_config([{"name": "a", "speed": 1}], seconds_per_step=1, uplink=8, downlink=8, deadline=8))
    # 6 s of work; a byte takes 10^-6 s each way.
    assert fates.late("a", 10**6, 10**6) is None
    assert fates.late("a", 10**6, 10**6 + 1) is not None
    found = fates.late("a", 2 * 10**6 + 1)
    assert found is not None and (found.fault, found.why) == ("late", "no answer in 8 virtual seconds")


# One phase

SITES = ["a", "b", "c", "d"]
CLOCK = Clock(
    _config(
        [{"name": name, "speed": speed} for name, speed in zip(SITES, (1, 2, 3, 4), strict=True)],
        seconds_per_step=1,
        seconds_per_evaluation=0.5,
        uplink=8,
        downlink=80,
        latency=0.1,
        deadline=20,
    )
)


def _naive(down: int, up: int | None, steps: float, speed: float) -> float:
    """A site's seconds, written out."""
    seconds = 0.1 + 8 * down / 80e6 + steps * 1.0 / speed
    return seconds if up is None else seconds + 0.1 + 8 * up / 8e6


def test_a_phase_takes_as_long_as_its_slowest_site() -> None:
    down, up = {"a": 10**6, "b": 10**6, "c": 10**6}, {"a": 10**6, "b": 9 * 10**6, "c": 10**6}
    found = timekeeping.of_phase(Phase("train", 1, exchanges=[Exchange("train", down, up)]), CLOCK)
    times = {site: _naive(down[site], up[site], 6, speed) for site, speed in (("a", 1), ("b", 2), ("c", 3))}
    assert found["virtual_seconds"] == pytest.approx(max(times.values()))
    parts = found["virtual"]
    assert parts.pop("slowest") == "b"
    assert parts == pytest.approx({"down": 0.2, "compute": 3.0, "up": 9.1, "waiting": 0.0})


def test_nobody_waits_for_the_absent_and_half_for_the_crashed() -> None:
    exchange = Exchange("train", dict.fromkeys(SITES, 10**6), {"d": 10**6})
    faults: dict[str, Any] = {"a": "absent", "b": "crashed", "c": "refused"}
    phase = Phase("train", 1, faults=faults, exchanges=[exchange])
    exchange.up["c"] = 100
    times = {
        "b": _naive(10**6, None, 3, 2),
        "c": _naive(10**6, 100, 6, 3),
        "d": _naive(10**6, 10**6, 6, 4),
    }
    found = timekeeping.of_phase(phase, CLOCK)
    assert found["virtual_seconds"] == pytest.approx(max(times.values()))
    assert found["virtual"]["slowest"] == max(times, key=lambda site: times[site])


def test_where_somebody_is_late_the_deadline_is_what_a_phase_takes() -> None:
    faults: dict[str, Any] = {"d": "late"}
    exchange = Exchange("train", dict.fromkeys(SITES, 10**6), dict.fromkeys("abc", 10**6))
    found = timekeeping.of_phase(Phase("train", 1, faults=faults, exchanges=[exchange]), CLOCK)
    assert found == {
        "virtual_seconds": 20,
        "virtual": {"slowest": "d", "down": 0, "compute": 0, "up": 0, "waiting": 20},
    }


def test_the_second_pass_of_a_training_comes_after_the_first_and_trains_nothing() -> None:
    first = Exchange("train", {"a": 10**6, "b": 10**6}, {"a": 10**6, "b": 10**6})
    second = Exchange("refine", {"a": 10**5, "b": 10**5}, {"a": 10**4, "b": 10**7})
    found = timekeeping.of_phase(Phase("train", 1, exchanges=[first, second]), CLOCK)
    ones = max(_naive(10**6, 10**6, 6, 1), _naive(10**6, 10**6, 6, 2))
    twos = max(_naive(10**5, 10**4, 0, 1), _naive(10**5, 10**7, 0, 2))
    assert found["virtual_seconds"] == pytest.approx(ones + twos)
    assert found["virtual"]["slowest"] == "b"
    # Whoever was waited for longest, in whichever of the two.
    second.up["b"] = 10**4
    assert timekeeping.of_phase(Phase("train", 1, exchanges=[first, second]), CLOCK)["virtual"]["slowest"] == "a"


def test_a_site_that_must_be_told_again_trains_once() -> None:
    """It had not held what the first instruction built on, said so at once, and got the whole."""
    first = Exchange("train", {"a": 1000, "b": 1000}, {"a": 100, "b": 10**6})
    second = Exchange("train", {"a": 10**6}, {"a": 10**6})
    found = timekeeping.of_phase(Phase("train", 1, exchanges=[first, second]), CLOCK)
    ones = max(_naive(1000, 100, 0, 1), _naive(1000, 10**6, 6, 2))
    assert found["virtual_seconds"] == pytest.approx(ones + _naive(10**6, 10**6, 6, 1))


def test_a_phase_that_asked_nobody_takes_no_time() -> None:
    assert timekeeping.of_phase(Phase("train", 1), CLOCK)["virtual_seconds"] == 0
    absent = Phase("train", 1, faults={"a": "absent"}, exchanges=[Exchange("train", {"a": 5})])
    assert timekeeping.of_phase(absent, CLOCK)["virtual_seconds"] == 0


def test_the_slowest_site_of_a_run_is_the_one_waited_for_longest() -> None:
    lines = [
        {"virtual_seconds": 3.0, "virtual": {"slowest": "a", "down": 1.0, "compute": 1.0, "up": 1.0, "waiting": 0.0}},
        {"virtual_seconds": 4.0, "virtual": {"slowest": "b", "down": 1.0, "compute": 2.0, "up": 1.0, "waiting": 0.0}},
        {"virtual_seconds": 2.0, "virtual": {"slowest": "a", "down": 0.0, "compute": 0.0, "up": 0.0, "waiting": 2.0}},
    ]
    assert timekeeping.of_run(lines) == {
        "seconds": 9.0,
        "slowest": "a",
        "down": 2.0,
        "compute": 3.0,
        "up": 2.0,
        "waiting": 2.0,
    }
    assert timekeeping.of_run([{"kind": "train"}]) is None


# A whole run

TIMED: dict[str, Any] = {
    "rounds": 2,
    "server.quorum": 1,
    "simulation.seconds_per_step": 2.0,
    "simulation.seconds_per_evaluation": 1.0,
    "simulation.uplink": 1.0,
    "simulation.downlink": 10.0,
    "simulation.latency": 0.05,
    "simulation.deadline": 30.0,
    "data.sites": [
        {"name": "east", "speed": 1},
        {"name": "north", "speed": 0.5, "uplink": 0.2},
        {"name": "south", "speed": 0.1},
    ],
}


def test_a_run_tells_what_it_would_have_taken(tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> None:
    """Three steps of 2 s at a tenth of the speed are 60 s, and the server waits 30: south never counts."""
    run = tiny_federation.run(tiny_federation.config(**TIMED), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["faults"] == {"south": "late"}
        assert line["missing"] == {"south": "no answer in 30 virtual seconds"}
        assert line["virtual_seconds"] == 30 and line["virtual"]["slowest"] == "south"
    # An evaluation takes south 10 s, and what its bytes take: each site got and gave about the same.
    scored = [line for line in lines if line["kind"] == "evaluate"]
    for line in scored:
        mine = line["bytes_down"] / 3
        assert line["virtual"]["slowest"] == "south" and line["virtual"]["compute"] == 10
        assert line["virtual"]["down"] == pytest.approx(0.05 + 8 * mine / 10e6, rel=0.05)
        assert line["virtual"]["up"] == pytest.approx(0.05 + 8 * line["bytes_up"] / 3 / 1e6, rel=0.05)
    total = sum(line["virtual_seconds"] for line in lines)
    assert run["virtual"]["seconds"] == pytest.approx(total) and run["virtual"]["slowest"] == "south"
    assert sum(run["virtual"][part] for part in ("down", "compute", "up", "waiting")) == pytest.approx(total)
    assert run["sites"]["south"]["missed"]["late"] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Virtual time" in page and "south" in page


def test_the_bytes_of_an_answer_can_make_it_late_and_privacy_is_spent_all_the_same(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    """North's work is done long before the deadline; its upload is not, which is known only when it is there."""
    sites = ["east", {"name": "north", "uplink": 0.001}]
    timed = {"rounds": 1, "server.quorum": 1, "simulation.deadline": 30.0, "data.sites": sites}
    run = tiny_federation.run(tiny_federation.private(**timed), tmp_path / "run")
    (line,) = tinyfederation.metrics(tmp_path / "run", "train")
    assert line["faults"] == {"north": "late"} and line["virtual_seconds"] == 30
    assert run["sites"]["north"]["privacy"]["steps"] == 3
    assert tinyfederation.metrics(tmp_path / "run", "evaluate")[0]["virtual"]["slowest"] == "north"


def test_the_clock_changes_nothing_but_the_record(tiny_federation: Any, tmp_path: Path) -> None:
    plain = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "plain")
    timed = {"rounds": 1, "simulation.seconds_per_step": 1.0, "simulation.uplink": 5.0, "simulation.speed_spread": 0.3}
    clocked = tiny_federation.run(tiny_federation.config(**timed), tmp_path / "clocked")
    assert clocked["digest"] == plain["digest"]
    assert "virtual" not in plain and clocked["virtual"]["seconds"] > 3
