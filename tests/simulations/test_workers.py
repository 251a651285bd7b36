"""The engine `workers`: its order, its window, what crosses, what a death costs, and that nothing is left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgraft.core.errors import UserError
from fedgraft.core.profile import Profile
from fedgraft.core.progress import Watch
from fedgraft.simulations import run as runs
from fedgraft.simulations.engines import pool as pools
from fedgraft.simulations.engines import workers
from fedgraft.simulations.engines.channel import Channel, Closed, from_bytes, to_bytes
from fedgraft.simulations.engines.pool import Member, Pool
from fedgraft.simulations.engines.workers import WorkersGrid, shares
from fedgraft.simulations.execution import Execution

# Who serves whom


def test_the_heaviest_worker_has_at_most_a_third_more_than_it_must() -> None:
    """Against every way to share out a few sites: Graham's bound of 4/3 - 1/(3m)."""
    draw = random.Random(3)
    for count in (2, 3):
        loads = [draw.choice([1.0, 2.0, 5.0, 9.0]) for _ in range(7)]
        best = min(
            max(sum(load for load, owner in zip(loads, owners, strict=True) if owner == w) for w in range(count))
            for owners in itertools.product(range(count), repeat=len(loads))
        )
        owners = shares(loads, count)
        longest = max(sum(load for load, owner in zip(loads, owners, strict=True) if owner == w) for w in range(count))
        assert longest <= best * (4 / 3 - 1 / (3 * count)) + 1e-12


def test_equal_sites_go_to_the_workers_in_turn() -> None:
    assert shares([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]


# The grid, over workers that are threads of this process


class Thread:
    """A worker that does what a test has it do: ``answer(head, contents)`` gives its replies, None ends it."""

    def __init__(self, answer: Callable[[dict[str, Any], list[RecordDict]], list[RecordDict] | None]) -> None:
        here, there = socket.socketpair()
        self.channel = Channel.of(here)
        self.heads: list[dict[str, Any]] = []
        self._there = Channel.of(there)
        self._answer = answer
        self._common: dict[int, RecordDict] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def member(self, why: str = "was ended by SIGKILL") -> Member:
        member = Member(self.channel)
        member.why = lambda: why  # type: ignore[method-assign]
        return member

    def _serve(self) -> None:
        try:
            while True:
                head, parts = self._there.receive()
                self.heads.append(head)
                if head["is"] == "begin":
                    self.cohort = head["cohort"]
                    continue
                own, common = parts[: len(head["sites"])], parts[len(head["sites"]) :]
                self._common |= {n: from_bytes(part) for n, part in zip(head["common"], common, strict=True)}
                for number in head["forget"]:
                    del self._common[number]
                contents = [
                    RecordDict({**from_bytes(part), **self._common[number]})
                    for (_, _, number), part in zip(head["sites"], own, strict=True)
                ]
                replies = self._answer(head, contents)
                if replies is None:
                    self._there.close()
                    return
                told = {"is": "answers", "number": head["number"], "errors": [None] * len(replies), "events": []}
                self._there.send({**told, "profile": {}, "cohort": self.cohort}, [to_bytes(reply) for reply in replies])
        except Closed:
            return


class FakePool:
    threads = 1

    def __init__(self, *threads: Thread) -> None:
        self.members = [thread.member() for thread in threads]


def grid_of(threads: list[Thread], sites: int, watch: Watch | None = None, **more: Any) -> WorkersGrid:
    loads = more.pop("loads", [1.0] * sites)
    return WorkersGrid(FakePool(*threads), loads, Path("/run"), watch=watch or Watch(), **more)  # type: ignore[arg-type]


def echo(head: dict[str, Any], contents: list[RecordDict]) -> list[RecordDict]:
    """Each site says which it was asked as, and the sum of what it got."""
    return [
        RecordDict({"job": ConfigRecord({"node": node, "sum": float(content["adapter"]["a"].numpy().sum())})})
        for (node, _, _), content in zip(head["sites"], contents, strict=True)
    ]


def instructions(grid: WorkersGrid, taken: list[int] | None = None, record: Any = None) -> Iterator[Message]:
    """One a site, all with the same ``record``."""
    record = record or ArrayRecord({"a": Array(np.ones(3, np.float32))})
    for node in grid.get_node_ids():
        if taken is not None:
            taken.append(node)
        yield grid.create_message(RecordDict({"job": ConfigRecord({"n": node}), "adapter": record}), "train", node, "1")


def nodes(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_answers_come_in_the_order_of_the_instructions_whoever_is_done_first() -> None:
    def slow(head: dict[str, Any], contents: list[RecordDict]) -> list[RecordDict]:
        time.sleep(0.05)
        return echo(head, contents)

    grid = grid_of([Thread(slow), Thread(echo), Thread(echo)], 9)
    replies = list(grid.send_and_receive(instructions(grid)))
    assert nodes(replies) == list(grid.get_node_ids())
    assert [reply.content["job"]["node"] for reply in replies] == nodes(replies)
    assert {reply.content["job"]["sum"] for reply in replies} == {3.0}


def test_no_more_sites_are_asked_ahead_than_the_window_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_WINDOW", 6)
    grid, taken = grid_of([Thread(echo), Thread(echo)], 40), list[int]()
    for done, _ in enumerate(grid.send_and_receive(instructions(grid, taken))):
        assert len(taken) <= done + 6
    assert len(taken) == 40


def test_sites_are_answered_in_cohorts_and_none_is_left_over() -> None:
    threads = [Thread(echo), Thread(echo)]
    grid = grid_of(threads, 22, cohort=4)
    assert nodes(list(grid.send_and_receive(instructions(grid)))) == list(grid.get_node_ids())
    for thread in threads:
        assert [len(head["sites"]) for head in thread.heads if head["is"] == "instructions"] == [4, 4, 3]


def test_what_the_sites_of_a_round_have_in_common_goes_to_each_worker_once() -> None:
    threads = [Thread(echo), Thread(echo)]
    grid = grid_of(threads, 12)
    for value in (1, 2, 3):
        record = ArrayRecord({"a": Array(np.full(3, value, np.float32))})
        for _ in ("train", "evaluate"):
            replies = list(grid.send_and_receive(instructions(grid, record=record)))
            assert {reply.content["job"]["sum"] for reply in replies} == {3.0 * value}
    for thread in threads:
        assert sum(len(head["common"]) for head in thread.heads if head["is"] == "instructions") == 3


def test_a_worker_forgets_common_records_that_are_long_out_of_use() -> None:
    threads = [Thread(echo)]
    grid = grid_of(threads, 1)
    for value in range(20):
        record = ArrayRecord({"a": Array(np.full(3, value, np.float32))})
        (reply,) = grid.send_and_receive(instructions(grid, record=record))
        assert reply.content["job"]["sum"] == 3.0 * value
    assert len(threads[0]._common) == workers._KEEP


class Notes(Watch):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_a_worker_that_dies_owes_what_it_was_given_and_the_others_take_over_its_sites() -> None:
    def dies(head: dict[str, Any], contents: list[RecordDict]) -> None:
        return None

    notes, threads = Notes(), [Thread(dies), Thread(echo)]
    grid = grid_of(threads, 10, notes)
    replies = list(grid.send_and_receive(instructions(grid)))
    assert nodes(replies) == list(grid.get_node_ids())
    lost = [reply for reply in replies if reply.has_error()]
    # It answered one and had another waiting; the sites that it had not been given yet are answered by the other.
    assert 1 <= len(lost) <= workers._AHEAD
    assert {reply.error.reason for reply in lost} == {"worker 1 of 2 was ended by SIGKILL"}
    assert notes.texts == ["worker 1 of 2 was ended by SIGKILL; the others take over its sites"]
    replies = list(grid.send_and_receive(instructions(grid)))
    assert [reply.has_error() for reply in replies] == [False] * 10


def test_when_no_worker_is_left_the_run_ends_in_one_line() -> None:
    grid = grid_of([Thread(lambda head, contents: None)], 3)
    with pytest.raises(UserError, match=r"^no worker is left: worker 1 of 1 was ended by SIGKILL$"):
        list(grid.send_and_receive(instructions(grid)))


def test_what_comes_after_the_time_is_up_is_never_given() -> None:
    going = threading.Event()

    def waits(head: dict[str, Any], contents: list[RecordDict]) -> list[RecordDict]:
        going.wait(10)
        return echo(head, contents)

    grid = grid_of([Thread(echo), Thread(waits)], 2)
    assert nodes(list(grid.send_and_receive(instructions(grid), timeout=0.3))) == [2]
    going.set()
    # The late answer is to a question that nobody asks any more.
    record = ArrayRecord({"a": Array(np.full(3, 7, np.float32))})
    replies = list(grid.send_and_receive(instructions(grid, record=record), timeout=10))
    assert [(reply.content["job"]["node"], reply.content["job"]["sum"]) for reply in replies] == [(2, 21.0), (3, 21.0)]


def test_pulling_gives_what_was_pushed_once() -> None:
    grid = grid_of([Thread(echo)], 2)
    ids = list(grid.push_messages(instructions(grid)))
    assert nodes(list(grid.pull_messages(ids))) == [2, 3]
    assert list(grid.pull_messages(ids)) == list(grid.pull_messages(["unknown"])) == []


# Real workers


def family() -> set[int]:
    """The processes that this one started. Those that they divide into are not always there yet."""
    return {process.pid for process in psutil.Process().children()}


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


class Events(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int]] = []
        self.finished: list[tuple[str, str]] = []

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        assert steps == 3 and loss is not None
        self.steps.append((site, step))

    def site_finished(self, kind: str, site: str) -> None:
        self.finished.append((kind, site))


def test_every_step_of_every_site_is_told_and_where_the_time_went(
    tiny_federation: Any, tinyfederation: ModuleType, on_workers: Any, tmp_path: Path
) -> None:
    events, profile = Events(), Profile()
    run = on_workers(tiny_federation.config(rounds=2), tmp_path / "run", watch=events, profile=profile)
    assert run["status"] == "finished"
    want = [(site, step) for site in tinyfederation.SITES for step in (1, 2, 3)] * 2
    assert sorted(events.steps) == sorted(want)
    kinds = ["hello", *["evaluate"] * 3, *["train"] * 2]
    assert sorted(events.finished) == sorted((kind, site) for kind in kinds for site in tinyfederation.SITES)
    assert profile.seconds["forward"] > 0 and profile.calls["forward"] >= 18


def test_each_site_keeps_its_own_ledger_and_audit_log(
    tiny_federation: Any, tinyfederation: ModuleType, on_workers: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(rounds=2)
    mine = tiny_federation.run(config, tmp_path / "inprocess")
    theirs = on_workers(config, tmp_path / "workers")
    for site in tinyfederation.SITES:
        assert theirs["sites"][site]["epsilon"] == mine["sites"][site]["epsilon"] > 0
        one, two = (tmp_path / name / "sites" / site for name in ("inprocess", "workers"))
        assert {p.relative_to(one) for p in one.rglob("*") if p.is_file()} == {
            p.relative_to(two) for p in two.rglob("*") if p.is_file()
        }
        for place in (one, two):
            (ledger,) = (place / "ledgers").glob("*.jsonl")
            lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
            assert [line["outcome"] for line in lines if "outcome" in line] == ["released"] * 2
            assert len(lines) == 4


class Killer(Notes):
    """Ends a process as a training begins."""

    def __init__(self, pid: int, round: int) -> None:
        super().__init__()
        self.pid, self.round = pid, round
        self.at = 0.0

    def phase_started(self, kind: str, round: int, sites: int) -> None:
        if (kind, round) == ("train", self.round):
            os.kill(self.pid, signal.SIGKILL)
            self.at = time.monotonic()


@pytest.mark.slow
def test_a_worker_killed_in_a_round_is_named_and_the_run_goes_on_and_then_none_is_left(
    tiny_federation: Any, tinyfederation: ModuleType, on_workers: Any, tmp_path: Path
) -> None:
    before = family()
    config = tiny_federation.config(**{"server.quorum": 2})
    with Pool(config, 2, 1) as pool:
        (parent,) = [psutil.Process(pid) for pid in family() - before]
        first, second = wait_for(
            lambda: len(found := sorted(parent.children(), key=lambda child: child.pid)) == 2 and found, 90
        )
        killer = Killer(second.pid, 2)
        run = on_workers(config, tmp_path / "one", watch=killer, pool=pool)
        assert time.monotonic() - killer.at < 10
        assert (run["status"], run["rounds"]) == ("finished", 3)
        why = "worker 2 of 2 was ended by SIGKILL, as happens when memory runs out"
        assert f"{why}; the others take over its sites" in killer.texts
        missing = [line["missing"] for line in tinyfederation.metrics(tmp_path / "one", "train")]
        assert missing == [{}, {"north": f"its process failed: {why}"}, {}]
        assert [line["missing"] for line in tinyfederation.metrics(tmp_path / "one", "evaluate")] == [{}] * 4

        whole = tiny_federation.config()
        with pytest.raises(UserError, match=r"^no worker is left: worker 1 of 2 was ended by SIGKILL"):
            on_workers(whole, tmp_path / "two", watch=Killer(first.pid, 2), pool=pool)
    assert psutil.wait_procs([parent, first, second], timeout=5)[1] == []
    # What a dead worker has spent is spent, and the run goes on as if it had never been begun on another engine.
    again = runs.resume(tmp_path / "two")
    assert again["digest"] == tiny_federation.run(whole, tmp_path / "three")["digest"]
    assert (again["engine"], again["resumed"][0]["from_round"]) == ("inprocess", 1)


def test_workers_that_cannot_start_are_one_line(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_MODULE", "fedgraft.no_such_module")
    before = family()
    with pytest.raises(UserError, match=r"^no worker is left: .* ended by itself: .*No module named fedgraft\.no_such"):
        runs.simulate(tiny_federation.config(), tmp_path / "run", execution=Execution("workers", workers=2))
    assert family() == before


@pytest.fixture
def scenario(tiny_federation: Any, tmp_path: Path) -> Path:
    """A configuration file whose run takes a while."""
    path = tmp_path / "scenario.json"
    path.write_text(tiny_federation.config(rounds=40).to_json())
    return path


def started(scenario: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """`fedgraft simulate` on two workers, after its second round."""
    command = [sys.executable, "-m", "fedgraft", "simulate", str(scenario), "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--engine", "workers", "--workers", "2", "--threads", "1", *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    metrics = output / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and '"round": 2' in metrics.read_text(), 90)
    return process


@pytest.mark.slow
def test_a_killed_server_leaves_no_worker_behind_and_the_run_can_be_resumed_on_any_engine(
    tiny_federation: Any, scenario: Path, tmp_path: Path
) -> None:
    server = started(scenario, tmp_path / "run")
    left = psutil.Process(server.pid).children(recursive=True)
    assert len(left) == 3
    line = left[0].cmdline()
    place = Path(line[line.index("fedgraft.simulations.engines.worker") + 1]).parent
    assert place.is_dir()
    server.kill()
    server.wait()
    assert psutil.wait_procs(left, timeout=5)[1] == []
    assert not place.exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    whole = tiny_federation.run(tiny_federation.config(rounds=40), tmp_path / "whole")
    for folder, execution in (("run", Execution("workers", workers=3, threads=1)), ("copy", Execution())):
        run = runs.resume(tmp_path / folder, execution=execution)
        assert (run["status"], run["digest"]) == ("finished", whole["digest"])


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_server_that_is_told_to_end_leaves_no_worker_behind(
    sign: signal.Signals, code: int, scenario: Path, tmp_path: Path
) -> None:
    server = started(scenario, tmp_path / "run")
    left = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(sign)
    _, said = server.communicate(timeout=20)
    assert server.returncode == code
    assert psutil.wait_procs(left, timeout=5)[1] == []
    assert b"Traceback" not in said
    if sign == signal.SIGINT:
        assert said.splitlines()[-1] == b"fedgraft: stopped; a run that had begun can be resumed with --resume"


@pytest.mark.slow
def test_torchrun_starts_the_workers_of_a_run(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config()
    scenario = tmp_path / "scenario.json"
    scenario.write_text(config.to_json())
    before = family()
    command = [*(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "fedgraft", "simulate", str(scenario)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run"), "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # One server, whatever the number of ranks.
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["engine"] == "workers"
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["execution"]["why"] == "torchrun has started 2 processes"
    assert run["digest"] == tiny_federation.run(config, tmp_path / "inprocess")["digest"]
    assert wait_for(lambda: family() == before)


def test_a_machine_that_gives_no_process_is_told_in_one_line(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any, **more: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pools.subprocess, "Popen", refuses)
    with pytest.raises(UserError, match=r"^the workers cannot be started: .*Resource temporarily unavailable$"):
        runs.simulate(tiny_federation.config(), tmp_path / "run", execution=Execution("workers", workers=2))
    assert not (tmp_path / "run").exists()
