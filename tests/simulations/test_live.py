"""What a person sees while a run goes: bars that end where they should, in the width there is, at hardly any cost."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgraft.core.config import RunConfig
from fedgraft.simulations import live as module
from fedgraft.simulations.live import Live


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.config(rounds=2, **{"train.local_steps": 4})  # type: ignore[no-any-return]


def watched(config: RunConfig, sites: int, *, terminal: bool = True, width: int = 80) -> Live:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    live = Live(console, config)
    live.run_started(first_round=1, rounds=config.rounds, sites={f"site-{n}": {} for n in range(sites)})
    return live


def frame(live: Live) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=live.console.width, color_system=None)
    console.print(live._frame())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def written(live: Live) -> str:
    return live.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def line(kind: str, round: int, **more: Any) -> dict[str, Any]:
    base = {"kind": kind, "round": round, "seconds": 1.0, "bytes_up": 600, "bytes_down": 400, "missing": {}}
    scores = {"accuracy": 0.5, "loss": 1.0} if kind == "evaluate" else {}
    return {**base, "sites": {}, **scores, **more}


def test_each_of_a_few_sites_has_a_bar(config: RunConfig) -> None:
    live = watched(config, 3)
    live.phase_started("train", 1, 3)
    live.site_step("site-0", 4, 4, 0.25, None)
    live.site_finished("train", "site-0")
    live.site_step("site-1", 2, 4, 1.5, 3.256)
    whole, *sites = frame(live)
    assert whole.startswith("round 1/2 training · 0 B ") and "left" in whole
    assert [row.split()[0] for row in sites] == ["site-0", "site-1", "site-2"]
    assert "step 4/4  loss 0.250" in sites[0]
    assert "step 2/4  loss 1.500  ε 3.26" in sites[1]
    assert "step" not in sites[2]
    live.phase_finished(line("train", 1, missing={"site-2": "no answer in 60 s"}, faults={"site-2": "late"}))
    live.phase_started("evaluate", 1, 3)
    live.site_finished("evaluate", "site-0")
    whole, *sites = frame(live)
    assert whole.startswith("round 1/2 evaluating · 1.0 kB ")
    assert "done" in sites[0] and "done" not in sites[1]
    assert sites[2].rstrip().endswith("late")
    live.phase_started("train", 2, 3)
    assert "late" not in "".join(frame(live)), "it may come this time"


def test_many_sites_have_a_line_together(config: RunConfig) -> None:
    live = watched(config, 1000)
    live.phase_started("train", 1, 1000)
    for number in range(37):
        live.site_step(f"site-{number}", 4, 4, 0.5, None)
        live.site_finished("train", f"site-{number}")
    live.site_step("site-40", 3, 4, 0.125, None)
    _, *sites = frame(live)
    assert [row.strip() for row in sites] == ["37 of 1,000 sites", "site-40  step 3/4  loss 0.125"]
    for number in range(41, 60):
        live.site_step(f"site-{number}", 1, 4, None, 2.0)
    _, *sites = frame(live)
    assert [row.strip() for row in sites] == [
        "37 of 1,000 sites",
        "site-40  step 3/4  loss 0.125",
        *(f"site-{number}  step 1/4  ε 2.00" for number in (41, 42, 43)),
        "and 16 more at work",
    ]
    live.phase_finished(line("train", 1, missing={f"site-{n}": "away" for n in range(300)}))
    live.phase_started("evaluate", 1, 1000)
    assert frame(live)[1].strip() == "0 of 1,000 sites, 300 missing"


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("sites", [3, 8, 9, 5000])
def test_every_line_fits_the_terminal(tiny_federation: Any, width: int, sites: int) -> None:
    config = tiny_federation.config(rounds=1000, **{"train.local_steps": 1000})
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    live = Live(console, config)
    names = [f"hospital-of-a-town-with-a-very-long-name-{number:04d}" for number in range(sites)]
    live.run_started(first_round=1, rounds=1000, sites={name: {} for name in names})
    live.phase_started("train", 1000, sites)
    live._bytes = 123_456_000
    live._missing = dict.fromkeys(names[:2], "no answer in 3600 s, which is a long reason for not being there")
    for name in names[: sites - 1]:
        live.site_step(name, 1000, 1000, 1234.5678, 99.99)
    rows = frame(live)
    assert len(rows) == (sites + 1 if sites <= 8 else 7)
    assert all(len(row) <= width for row in rows)
    assert "round 1000/1000 training · 123.5 MB" in rows[0]
    assert rows[0].rstrip().endswith(" left"), "what matters most is cut off"


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_bar_is_full_when_the_run_is_over(tiny_federation: Any, tmp_path: Path, every: int) -> None:
    config = tiny_federation.config(**{"evaluate.every": every})
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Live(console, config) as live:
        tiny_federation.run(config, tmp_path / "run", watch=live)
        assert live.done == 1.0
        assert "100 %" in frame(live)[0] and "0:00:00 left" in frame(live)[0]
    longer = tiny_federation.config(rounds=4, **{"evaluate.every": every})
    with Live(console, longer) as live:
        tiny_federation.resume(longer, tmp_path / "run", watch=live, rounds=4)
        assert live.done == 1.0
        assert live._plan.total == 3 * (config.train.local_steps + 1)


def test_the_bar_goes_on_past_sites_that_are_missing(config: RunConfig) -> None:
    """Two rounds of four steps and three evaluations: 24 steps and 9 evaluations of three sites."""
    live = watched(config, 3)
    seen = [live.done]
    for kind, number in (("evaluate", 0), ("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 2)):
        live.phase_started(kind, number, 3)
        if kind == "train":
            for step in range(4):
                live.site_step("site-0", step + 1, 4, None, None)
        live.site_finished(kind, "site-0")
        seen.append(live.done)
        live.phase_finished(line(kind, number, missing={"site-1": "away", "site-2": "away"}))
        seen.append(live.done)
    assert seen == pytest.approx([n / 33 for n in (0, 1, 3, 7, 15, 16, 18, 22, 30, 31, 33)])


def test_sites_drawn_by_round_are_planned_for(tiny_federation: Any) -> None:
    config = tiny_federation.config(rounds=2, **{"train.local_steps": 4, "server.sites_per_round": 2})
    live = watched(config, 3)
    for kind, number, sites in (("evaluate", 0, 3), ("train", 1, 2), ("evaluate", 1, 3), ("train", 2, 2)):
        live.phase_started(kind, number, sites)
        live.phase_finished(line(kind, number))
    assert live.done == pytest.approx(1 - 3 / 25)


def test_the_time_left_is_what_the_phases_took(config: RunConfig, clock: Clock) -> None:
    live = watched(config, 2)
    live.phase_started("evaluate", 0, 2)
    assert live._plan.seconds_left(live._fraction) is None
    clock.now += 10
    live.phase_finished(line("evaluate", 0))
    live.phase_started("train", 1, 2)
    clock.now += 30
    for step in range(3):
        live.site_step("site-0", step + 1, 4, None, None)
    # Three of eight steps in 30 s: 80 s a training, 10 s an evaluation; 50 s of this one, then 10 + 80 + 10.
    assert live._plan.seconds_left(live._fraction) == pytest.approx(150)
    clock.now += 30
    live.phase_finished(line("train", 1))
    for kind, number, seconds in (("evaluate", 1, 20), ("train", 2, 60), ("evaluate", 2, 15)):
        live.phase_started(kind, number, 2)
        clock.now += seconds
        live.phase_finished(line(kind, number))
    assert live._plan.seconds_left(0.0) == 0.0


def test_without_a_terminal_there_are_plain_lines(config: RunConfig, clock: Clock) -> None:
    with watched(config, 3, terminal=False) as live:
        live.phase_started("train", 1, 1000)
        live.site_step("site-0", 1, 4, 0.5, None)
        for number in range(5):
            live.site_finished("train", f"site-{number}")
            clock.now += 12
        live.note("site [/red] is late")
        live.phase_finished(line("train", 1, sites={"site-0": {"loss": 0.5}}))
    assert written(live).splitlines() == [
        "round 1/2 training: 4 of 1,000 sites",
        "site [/red] is late",
        "round 1/2  train     1 sites  loss 0.500  600 B up, 400 B down  1.0 s",
    ]


def test_a_terminal_shows_what_is_over_above_the_bars(config: RunConfig) -> None:
    live = watched(config, 2)
    with live:
        live.phase_started("train", 1, 2)
        live.site_step("site-0", 1, 4, 0.5, None)
        live._screen.refresh()
        live.phase_finished(line("train", 1))
        live.note("site-1 is late")
    text = written(live)
    assert "round 1/2 training" in text and "step 1/4" in text
    assert "round 1/2  train" in text and "site-1 is late" in text


def test_a_step_costs_next_to_nothing(config: RunConfig) -> None:
    """Below 20 microseconds, drawing the terminal left aside: the least of five, for others run on the machine too."""
    live = watched(config, 1000)
    live.phase_started("train", 1, 1000)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for number in range(2000):
            live.site_step(f"site-{number % 8}", 1, 4, 0.5, 1.0)
        best = min(best, (time.perf_counter() - began) / 2000)
    assert best < 20e-6
