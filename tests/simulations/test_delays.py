"""Stragglers whose results count a round or two later: whole runs against a naive twin of what sites sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.wire import decode_adapter
from fedgraft.privacy.ledger import Ledger
from fedgraft.server.rundir import read_metrics
from fedgraft.simulations import run as runs
from fedgraft.simulations.delays import Delays
from fedgraft.simulations.engines.local import FIRST_NODE
from fedgraft.simulations.execution import Execution

EAST = FIRST_NODE + 1
#: `east` is late in every round, by one.
SLOW: dict[str, Any] = {
    "rounds": 3,
    "evaluate.every": 0,
    "server.quorum": 2,
    "server.late": "staleness",
    "server.keep_checkpoints": 9,
    "data.sites": [{"name": "east", "straggler": True}, "north", "south"],
}
#: The same by the clock: 3 steps at speed 0.4 take 7.5 s of a deadline of 3 s, and are two rounds late.
SLOWER: dict[str, Any] = {
    **SLOW,
    "rounds": 5,
    "simulation.seconds_per_step": 1.0,
    "simulation.deadline": 3.0,
    "data.sites": [{"name": "east", "speed": 0.4}, "north", "south"],
}


class Recorder:
    """What every site answered in each training, whenever it came."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], Any] = {}

    def __call__(self, site: str, message: Message, give: Callable[[], Message]) -> Message:
        reply = give()
        if message.metadata.message_type == "train" and reply.has_content():
            self.answers[site, int(message.metadata.group_id)] = reply.content
        return reply


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if line["kind"] == "train"]


def state(folder: Path, number: int) -> AdapterState:
    return AdapterState.load(folder / "checkpoints" / f"round-{number:04d}" / "adapter.safetensors")


def twin(folder: Path, answers: dict[tuple[str, int], Any], number: int, arrived: Iterable[tuple[str, int]]) -> float:
    """How far the adapter after round ``number`` is from the weighted mean of fresh and rebased results."""
    before, after = state(folder, number - 1), state(folder, number)
    names = before.spec.select("share")
    total, weights = {name: np.zeros(before[name].shape) for name in names}, 0.0
    for site, begun in arrived:
        content, given = answers[site, begun], state(folder, begun - 1)
        theta = decode_adapter(content, given.spec, sender=site, names=names, base=given)
        weight = content["metrics"]["records"] / np.sqrt(1.0 + number - begun)
        weights += weight
        for name in names:
            moved = theta[name].astype(np.float64) - given[name].astype(np.float64)
            total[name] += weight * (before[name].astype(np.float64) + moved)
    return max(float(np.abs(total[name] / weights - after[name]).max()) for name in names)


@pytest.mark.parametrize(("changes", "age"), [(SLOW, 1), (SLOWER, 2)])
def test_a_straggler_s_result_counts_in_the_round_in_which_it_comes(
    tiny_federation: Any, tmp_path: Path, changes: dict[str, Any], age: int
) -> None:
    config = tiny_federation.config(**changes)
    recorder = Recorder()
    run = tiny_federation.run(config, tmp_path / "run", between=recorder)
    for number, line in enumerate(lines(tmp_path / "run"), 1):
        assert set(line["sites"]) == {"north", "south"} and line["faults"] == {"east": "late"}, "it missed the deadline"
        late = [("east", number - age)] if number > age else []
        assert line.get("late", []) == [{"site": site, "round": begun, "age": age, "why": ""} for site, begun in late]
        arrived = [*late, ("north", number), ("south", number)]
        # Rounding to float32 of numbers below 1, twice.
        assert twin(tmp_path / "run", recorder.answers, number, arrived) < 3e-7
        if late:
            assert twin(tmp_path / "run", recorder.answers, number, arrived[1:]) > 1e-5, "it makes a difference"
    used = config.rounds - age
    assert run["late"] == run["sites"]["east"]["late"] == {str(age): used}
    assert run["missed"]["late"] == run["sites"]["east"]["missed"]["late"] == config.rounds
    warning = f"east answered in 0 of {config.rounds} rounds ({config.rounds} late; {used} counted in a later round)"
    assert warning in run["warnings"]
    assert run["bytes_up"] > sum(line["bytes_up"] for line in lines(tmp_path / "run")[:age])


def test_with_the_policy_that_drops_nothing_of_it_counts(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(**{**SLOW, "server.late": "drop"})
    recorder = Recorder()
    run = tiny_federation.run(config, tmp_path / "run", between=recorder)
    assert run["late"] == {} and all("late" not in line for line in lines(tmp_path / "run"))
    for number in (1, 2, 3):
        assert twin(tmp_path / "run", recorder.answers, number, [("north", number), ("south", number)]) < 3e-7


def test_sites_that_train_together_give_the_same_bits(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(**SLOW)
    found = [
        runs.simulate(config, tmp_path / f"run-{cohort}", execution=Execution(engine="inprocess", cohort=cohort))
        for cohort in (1, 3)
    ]
    assert found[0]["late"] == found[1]["late"] == {"1": 2}
    states = [state(tmp_path / f"run-{cohort}", 3) for cohort in (1, 3)]
    assert max(float(np.abs(states[0][name] - states[1][name]).max()) for name in states[0]) < 1e-5


@pytest.mark.slow
def test_the_engine_with_several_processes_gives_the_same_bits(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(**SLOWER)
    engines = (Execution(engine="inprocess", threads=1), Execution(engine="workers", workers=2, threads=1))
    digests = {runs.simulate(config, tmp_path / each.engine, execution=each)["digest"] for each in engines}
    assert len(digests) == 1


def test_under_privacy_each_training_is_paid_for_once_and_a_late_result_tells_its_epsilon(
    tiny_federation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(**SLOW)
    run = tiny_federation.run(config, tmp_path / "run")
    entries = Ledger(tmp_path / "run" / "sites" / "east" / "ledgers").entries()
    assert [(entry.about["round"], entry.steps) for entry in entries if entry.part == "train"] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    told = [line["late"][0]["privacy"]["steps"] for line in lines(tmp_path / "run")[1:]]
    assert told == [3, 6]
    assert run["sites"]["east"]["epsilon"] <= config.privacy.epsilon
    assert any("east" in warning and "its ledger holds more" in warning for warning in run["warnings"]) or (
        run["sites"]["east"]["privacy"]["steps"] == 9
    ), "what the server does not know of is told, or nothing is unknown"


def test_a_resumed_run_takes_nothing_of_the_rounds_before_it_and_goes_on(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_federation.config(**{**SLOW, "rounds": 2})
    recorder = Recorder()
    tiny_federation.run(config, tmp_path / "run", between=recorder)
    before = state(tmp_path / "run", 2).digest
    plain = Delays.send_and_receive
    came: list[int] = []

    def again(grid: Any, messages: Any, *, timeout: float | None = None) -> Any:
        """What was still under way when the run stopped comes all the same, and so does what had counted."""
        for reply in plain(grid, messages, timeout=timeout):
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == EAST and not came:
                for number in (1, 2):
                    old = Message(recorder.answers["east", number], reply_to=reply)
                    old.metadata.__dict__.update(_src_node_id=EAST, _group_id=str(number))
                    came.append(number)
                    yield old
            yield reply

    monkeypatch.setattr(Delays, "send_and_receive", again)
    run = tiny_federation.resume(config, tmp_path / "run", between=recorder, rounds=4)
    assert came == [1, 2] and before == state(tmp_path / "run", 2).digest
    late = [line.get("late", []) for line in lines(tmp_path / "run")]
    assert [[entry["round"] for entry in each] for each in late] == [[], [1], [], [3]]
    assert twin(tmp_path / "run", recorder.answers, 3, [("north", 3), ("south", 3)]) < 3e-7
    assert twin(tmp_path / "run", recorder.answers, 4, [("east", 3), ("north", 4), ("south", 4)]) < 3e-7
    assert run["late"] == {"1": 2} and run["missed"]["late"] == 4


@pytest.mark.parametrize("name", ["rolora", "scaffold"])
def test_a_strategy_whose_rounds_differ_is_refused_before_anything_is_spent(
    tiny_federation: Any, tmp_path: Path, name: str
) -> None:
    config: RunConfig = tiny_federation.private(**SLOW, strategy=name)
    with pytest.raises(UserError, match=rf"server\.late.*strategy `{name}`"):
        tiny_federation.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_late_result_is_told_of(tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path) -> None:
    notes = tinyfederation.Notes()
    tiny_federation.run(tiny_federation.config(**SLOW), tmp_path / "run", watch=notes)
    assert [text for text in notes.texts if "the result of" in text] == [
        f"round {number}: the result of east of round {number - 1} counts now, 1 round late" for number in (2, 3)
    ]
    assert "2 late results counted in a later round." in (tmp_path / "run" / "report.html").read_text()
