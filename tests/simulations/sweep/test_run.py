"""A sweep runs every point once, whatever stops it in between."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedgraft.core.errors import UserError
from fedgraft.privacy.ledger import Ledger
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.sweep import run as sweeps
from fedgraft.simulations.sweep import worker
from fedgraft.simulations.sweep.grid import Axis
from fedgraft.simulations.sweep.interrupted import lost_nothing_paid
from fedgraft.simulations.sweep.plan import Sweep, make
from fedgraft.simulations.sweep.pool import run_in_processes, surroundings
from fedgraft.simulations.sweep.run import Outcome, carry_on, run_sweep
from fedgraft.simulations.sweep.watching import Watching

ONE = Execution(threads=1)
Traces = Callable[[Path], dict[str, tuple[str, int, bytes]]]


class Seen(Watching):
    def __init__(self) -> None:
        self.begins: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.start: tuple[int, int, int] | None = None

    def started(self, total: int, left: int, processes: int) -> None:
        self.start = (total, left, processes)

    def begun(self, name: str) -> None:
        self.begins.append(name)

    def ended(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def digests(outcome: Outcome) -> dict[str, str]:
    return {Path(row["path"]).name: row["digest"] for row in outcome.results.rows}


@pytest.fixture
def interrupt(tiny_federation: Any, tinyfederation: Any) -> Callable[[int], Any]:
    """``with interrupt(n)``: the n-th training of a site stops the process from inside."""

    def stopping(at: int) -> Any:
        count = 0

        def between(site: str, message: Any, answer: Any) -> Any:
            nonlocal count
            count += message.metadata.message_type == "train"
            if count == at:
                raise tinyfederation.Interrupted
            return answer()

        return tinyfederation.intercepted(between, tiny_federation.config())

    return stopping


def test_every_run_is_a_run_directory_of_its_own(done: Outcome, planned: Sweep):
    assert done.carried_out == 6
    for run in planned.runs:
        told = json.loads((done.folder / "runs" / run.name / "run.json").read_text())
        assert told["status"] == "finished" and told["config_digest"] == run.config.digest()
        assert told["engine"] == (f"baseline:{run.point.baseline}" if run.point.baseline else "inprocess")
    for name in ("results.csv", "results.json", "table.md", "report.html", "curves.svg", "accuracy-bytes.svg"):
        assert (done.folder / name).stat().st_size > 0


def test_what_is_finished_is_not_run_again(done: Outcome, planned: Sweep, traces: Traces):
    before, seen = traces(done.folder), Seen()
    again = run_sweep(planned, done.folder, parallel=1, execution=ONE, watch=seen)
    assert again.carried_out == 0 and seen.start == (6, 0, 1) and not seen.begins
    assert traces(done.folder) == before
    assert again.results.rows == done.results.rows


def test_a_sweep_that_was_stopped_goes_on_and_ends_as_if_it_had_not(
    done: Outcome, planned: Sweep, interrupt: Any, tinyfederation: Any, traces: Traces, tmp_path: Path
):
    """Stopped in the second round of the second run: 2 x 3 trainings of the first, 3 and 1 of the second."""
    with interrupt(10), pytest.raises(tinyfederation.Interrupted):
        run_sweep(planned, tmp_path / "cut", parallel=1, execution=ONE)
    before = traces(tmp_path / "cut")
    assert list(before) == [planned.runs[0].name]
    half = json.loads((tmp_path / "cut" / "runs" / planned.runs[1].name / "run.json").read_text())
    assert half["status"] == "running" and half["rounds"] == 1
    seen = Seen()
    outcome = carry_on(tmp_path / "cut", parallel=1, execution=ONE, watch=seen)
    assert seen.start == (6, 5, 1) and seen.begins == [run.name for run in planned.runs[1:]]
    after = traces(tmp_path / "cut")
    assert {name: after[name] for name in before} == before
    whole = json.loads((tmp_path / "cut" / "runs" / planned.runs[1].name / "run.json").read_text())
    assert whole["run"] == half["run"] and whole["resumed"][0]["from_round"] == 1
    assert digests(outcome) == digests(done)


def test_a_private_run_that_lost_a_paid_round_begins_anew(
    short: Callable[..., str], interrupt: Any, tinyfederation: Any, tmp_path: Path
):
    """Or it would go on under more noise than the others: seeded noise shows that it does not."""
    seeded = {"privacy.enabled": True, "privacy.delta": 1e-3, "privacy.seeded_noise_not_private": True}
    sweep = make(short(**seeded), [Axis("strategy", ("fedit",))])
    whole = run_sweep(sweep, tmp_path / "whole", parallel=1, execution=ONE)
    with interrupt(5), pytest.raises(tinyfederation.Interrupted):
        run_sweep(sweep, tmp_path / "cut", parallel=1, execution=ONE)
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    assert not lost_nothing_paid(folder)
    again = run_sweep(sweep, tmp_path / "cut", parallel=1, execution=ONE)
    assert json.loads((folder / "run.json").read_text())["resumed"] == []
    assert digests(again) == digests(whole)
    assert again.results.rows[0]["epsilon"] == whole.results.rows[0]["epsilon"]


def test_a_private_run_that_was_stopped_between_its_rounds_goes_on(
    short: Callable[..., str], tinyfederation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeded = {"privacy.enabled": True, "privacy.delta": 1e-3, "privacy.seeded_noise_not_private": True}
    sweep = make(short(**seeded), [Axis("strategy", ("fedit",))])
    whole = run_sweep(sweep, tmp_path / "whole", parallel=1, execution=ONE)
    from fedgraft.server.rounds import Federation

    plain = Federation._train

    def stop(self: Federation, number: int) -> None:
        if number == 2:
            raise tinyfederation.Interrupted
        plain(self, number)

    with monkeypatch.context() as patch, pytest.raises(tinyfederation.Interrupted):
        patch.setattr(Federation, "_train", stop)
        run_sweep(sweep, tmp_path / "cut", parallel=1, execution=ONE)
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    assert lost_nothing_paid(folder)
    assert Ledger(folder / "sites" / "east" / "ledgers").events()
    again = run_sweep(sweep, tmp_path / "cut", parallel=1, execution=ONE)
    assert json.loads((folder / "run.json").read_text())["resumed"][0]["from_round"] == 1
    assert digests(again) == digests(whole)


def test_a_run_that_fails_ends_no_other_and_is_tried_again(
    short: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned = make(short(rounds=1), [Axis("strategy", ("fedit", "ffa"))], baselines=("none",))
    plain, bad = worker.simulate, planned.runs[1].name

    def failing(config: Any, folder: Path, **more: Any) -> Any:
        if folder.name == bad:
            raise RuntimeError("the disk\ncaught fire")
        return plain(config, folder, **more)

    seen = Seen()
    with monkeypatch.context() as patch:
        patch.setattr(worker, "simulate", failing)
        outcome = run_sweep(planned, tmp_path / "sweep", parallel=1, execution=ONE, watch=seen)
    rows = {Path(row["path"]).name: row for row in outcome.results.rows}
    assert rows[bad]["status"] == "failed" and "the disk caught fire" in rows[bad]["error"]
    assert sum(row["status"] == "finished" for row in rows.values()) == 2
    assert [row["status"] for row in seen.rows].count("failed") == 1
    assert "caught fire" in (tmp_path / "sweep" / "log.txt").read_text()
    assert "caught fire" in (tmp_path / "sweep" / "table.md").read_text()
    again = run_sweep(planned, tmp_path / "sweep", parallel=1, execution=ONE)
    assert again.carried_out == 1 and all(row["status"] == "finished" for row in again.results.rows)


def test_seeds_that_are_added_run_and_the_others_stay(short: Callable[..., str], traces: Traces, tmp_path: Path):
    config = short(rounds=1)
    few, more = (make(config, [Axis("strategy", ("fedit",))], seeds=seeds) for seeds in (1, 2))
    run_sweep(few, tmp_path / "sweep", parallel=1, execution=ONE)
    before = traces(tmp_path / "sweep")
    outcome = run_sweep(more, tmp_path / "sweep", parallel=1, execution=ONE)
    assert outcome.carried_out == 1 and len(traces(tmp_path / "sweep")) == 2
    assert before.items() <= traces(tmp_path / "sweep").items()
    with pytest.raises(UserError, match="holds another sweep"):
        run_sweep(few, tmp_path / "sweep", parallel=1, execution=ONE)


def test_two_processes_do_not_carry_out_one_sweep(planned: Sweep, tmp_path: Path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is carrying out this sweep"):
            run_sweep(planned, tmp_path, parallel=1, execution=ONE)


def test_a_run_directory_of_another_configuration_is_not_taken_for_its_own(
    done: Outcome, planned: Sweep, tmp_path: Path
):
    shutil.copytree(done.folder, tmp_path / "sweep")
    runs = tmp_path / "sweep" / "runs"
    shutil.rmtree(runs / planned.runs[0].name)
    shutil.copytree(runs / planned.runs[1].name, runs / planned.runs[0].name)
    with pytest.raises(UserError, match="holds another run than the sweep's"):
        run_sweep(planned, tmp_path / "sweep", parallel=1, execution=ONE)


def test_a_refused_point_stays_in_the_table_and_does_not_run(short: Callable[..., str], tmp_path: Path):
    sweep = make(short(rounds=1), [Axis("method.heads", ("0", "2"))], skip_refused=True)
    outcome = run_sweep(sweep, tmp_path / "sweep", parallel=1, execution=ONE)
    assert outcome.carried_out == 1
    assert [row["status"] for row in outcome.results.rows] == ["finished", "refused"]
    assert "refused: method.heads=2" in (tmp_path / "sweep" / "table.md").read_text()


def test_the_same_command_comes_back_to_the_same_folder(planned: Sweep, short: Callable[..., str]):
    assert sweeps.default_folder(planned) == sweeps.default_folder(planned)
    other = make(short(), [Axis("strategy", ("fedit",))])
    assert sweeps.default_folder(other) != sweeps.default_folder(planned)
    assert sweeps.default_folder(planned).parent == Path("sweeps")


@pytest.mark.parametrize(
    ("parallel", "runs", "engine", "gpus", "processes"),
    [
        (0, 8, "inprocess", 0, 4),
        (0, 3, "inprocess", 0, 3),
        (6, 8, "inprocess", 0, 6),
        (0, 8, "inprocess", 2, 2),
        (0, 8, "auto", 0, 1),
        (2, 8, "workers", 0, 2),
    ],
)
def test_there_is_a_process_for_each_gpu_or_core_unless_runs_are_fewer(
    monkeypatch: pytest.MonkeyPatch, parallel: int, runs: int, engine: Any, gpus: int, processes: int
):
    monkeypatch.setattr(sweeps, "cores", lambda: 4)
    assert sweeps._processes(parallel, runs, Execution(engine), gpus) == processes


def test_the_last_run_of_a_parallel_sweep_has_as_many_threads_as_the_others(
    done: Outcome, planned: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweeps, "cores", lambda: 4)
    shutil.copytree(done.folder, tmp_path / "sweep")
    last = tmp_path / "sweep" / "runs" / planned.runs[-1].name
    shutil.rmtree(last)
    seen = Seen()
    run_sweep(planned, tmp_path / "sweep", parallel=2, watch=seen)
    assert seen.start == (6, 1, 1)
    assert json.loads((last / "run.json").read_text())["execution"]["threads"] == 2


def test_a_process_starts_with_its_threads_and_its_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with surroundings(2, 1):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("2", "1")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with surroundings(2, 1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    with surroundings(2, None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """The processes that a test itself has started."""
    before = set(psutil.Process().children(recursive=True))

    def started() -> list[psutil.Process]:
        found = [child for child in psutil.Process().children(recursive=True) if child not in before]
        return [child for child in found if "resource_tracker" not in _line(child)]

    return started


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_a_process_that_dies_costs_its_run_alone(
    planned: Sweep, done: Outcome, tmp_path: Path, children: Callable[[], list[psutil.Process]]
):
    jobs = [(run.config, tmp_path / "runs" / run.name) for run in planned.runs[:4]]
    ended: dict[int, str] = {}
    victims: list[int] = []

    def begun(index: int) -> None:
        if index == 1:
            (child,) = (child for child in children() if child.pid not in victims)
            victims.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    run_in_processes(jobs, 1, ONE, tmp_path, begun, lambda index, error: ended.update({index: error}))
    assert sorted(ended) == [0, 1, 2, 3] and not children()
    assert {index: error for index, error in ended.items() if error} == {
        1: "its process was ended by SIGKILL: perhaps the memory ran out, for which --parallel may be smaller"
    }
    assert json.loads((jobs[3][1] / "run.json").read_text())["digest"] == digests(done)[jobs[3][1].name]


@pytest.mark.slow
def test_several_processes_give_what_one_gives_and_none_stays(
    planned: Sweep, done: Outcome, tmp_path: Path, children: Callable[[], list[psutil.Process]]
):
    outcome = run_sweep(planned, tmp_path / "sweep", parallel=2, execution=ONE)
    assert digests(outcome) == digests(done)
    assert not children()


@pytest.mark.slow
def test_a_wait_that_is_broken_off_leaves_no_process(
    planned: Sweep, tmp_path: Path, children: Callable[[], list[psutil.Process]]
):
    jobs = [(run.config, tmp_path / "runs" / run.name) for run in planned.runs]

    def stop(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_processes(jobs, 2, ONE, tmp_path, stop, lambda index, error: None)
    assert not children()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_without_repeating_finished_runs(
    short: Callable[..., str], traces: Traces, tmp_path: Path
):
    """With SIGKILL, on two processes, which die with it; then the same command again."""
    config, folder = short(), tmp_path / "sweep"
    command = [sys.executable, "-m", "fedgraft", "sweep", config, "--grid", "strategy=fedit,ffa", "--seeds", "3"]
    command += ["--baselines", "none", "--output", str(folder), "--parallel", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(traces(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive, "its processes go with it"
    before = traces(folder)
    assert 2 <= len(before) < 9 and not (folder / "report.html").exists()
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert told.returncode == 0, told.stderr
    assert f"{len(before)} of 9 runs are finished already" in told.stderr
    after = traces(folder)
    assert len(after) == 9 and {name: after[name] for name in before} == before
    assert len({run for run, _, _ in after.values()}) == 9
    undisturbed = run_sweep(Sweep.read(folder), tmp_path / "whole", parallel=1, execution=ONE)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {Path(row["path"]).name: row["digest"] for row in rows} == digests(undisturbed)
