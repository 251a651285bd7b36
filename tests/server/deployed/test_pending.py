"""Jobs whose process has died go on, those that are over do not, and none goes on for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import RunConfig, config_from_json
from fedgraft.core.errors import UserError
from fedgraft.deployment.kits import ServerKit
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.server.deployed.control import Run
from fedgraft.server.deployed.jobs import stop, submit
from fedgraft.server.deployed.pending import TRIES, Pending, revive
from fedgraft.server.rundir import RunDirectory, read_run

_KILLED = "No heartbeat received from the task"


class Link:
    """Stands for a SuperLink's control interface; ``die`` ends what runs as Flower says it of a killed ServerApp."""

    def __init__(self) -> None:
        self.listed: list[Run] = []
        self.sent: list[dict[str, str]] = []

    def runs(self) -> list[Run]:
        return list(self.listed)

    def submit(self, bundle: Any, settings: dict[str, str]) -> int:
        self.sent.append(settings)
        self.listed.append(Run(len(self.sent), settings["output"], "running", "", "", ""))
        return len(self.sent)

    def end(self, status: str, details: str = "") -> None:
        run = self.listed[-1]
        self.listed[-1] = Run(run.id, run.name, status, details, "", "")

    def stop(self, run: int) -> None:
        self.end("stopped")


@pytest.fixture
def kit(tmp_path: Path) -> ServerKit:
    class Kit:
        """A server's folders."""

        state, runs = tmp_path / "state", tmp_path / "runs"

        @staticmethod
        def roster() -> Any:
            raise AssertionError("is not asked for")

    for folder in (Kit.state, Kit.runs):
        folder.mkdir()
    return Kit()  # type: ignore[return-value]


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.config(**{"data.path": "", "data.sites": ["east", "north"]})  # type: ignore[no-any-return]


@pytest.fixture
def link(kit: ServerKit, config: RunConfig) -> Link:
    """One on which the job `job` runs."""
    found = Link()
    found.submit(None, {"output": "job"})
    Pending("job", config.to_json()).keep(kit)
    return found


def _reach(kit: ServerKit, config: RunConfig, rounds: int, status: str = "running") -> None:
    """What a ServerApp leaves in the run directory."""
    (kit.runs / "job").mkdir(exist_ok=True)
    with RunDirectory(kit.runs / "job") as rundir:
        values = {"run": "r", "status": status, "started": "", "resumed": [], "model": {}, "error": ""}
        rundir.write_run({**values, "config": json.loads(config.to_json()), "rounds": rounds})


def _revived(kit: ServerKit, link: Link, *, alone: bool = False) -> list[str]:
    return list(revive(kit, link, alone=alone))  # type: ignore[arg-type]


def test_a_job_that_runs_is_left_alone(kit: ServerKit, link: Link, config: RunConfig) -> None:
    _reach(kit, config, 1)
    assert _revived(kit, link) == [] and len(link.sent) == 1 and Pending.of(kit, "job")


def test_a_job_whose_process_was_killed_goes_on_from_its_last_checkpoint(
    kit: ServerKit, link: Link, config: RunConfig
) -> None:
    _reach(kit, config, 1)
    link.end("failed", _KILLED)
    assert _revived(kit, link) == ["job: what ran it has died; it goes on from round 2"]
    assert link.sent[1:] == [{"output": "job", "resume": "job"}]
    assert _revived(kit, link) == [], "it runs again"
    (line,) = audit_journal(kit.state / "audit.jsonl").entries()
    assert (line["event"], line["run"], line["job"]) == ("resumed", "job", config.digest())


def test_one_that_had_reached_nothing_begins_anew(kit: ServerKit, link: Link) -> None:
    link.end("failed", _KILLED)
    assert _revived(kit, link) == ["job: what ran it has died; it goes on from the start"]
    assert link.sent[1:] == [{"output": "job"}]


def test_what_a_superlink_takes_for_running_after_its_own_start_is_not(
    kit: ServerKit, link: Link, config: RunConfig
) -> None:
    _reach(kit, config, 2)
    assert _revived(kit, link, alone=True) == ["job: what ran it has died; it goes on from round 3"]
    assert [(run.id, run.status) for run in link.listed] == [(1, "stopped"), (2, "running")]


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_job_that_is_over_is_forgotten(kit: ServerKit, link: Link, config: RunConfig, status: str) -> None:
    _reach(kit, config, 3, status)
    link.end("completed" if status == "finished" else "failed")
    assert _revived(kit, link) == [] and len(link.sent) == 1
    assert Pending.of(kit, "job") is None and read_run(kit.runs / "job")["status"] == status


def test_one_that_ended_by_itself_is_not_tried_again(kit: ServerKit, link: Link, config: RunConfig) -> None:
    _reach(kit, config, 1)
    link.end("failed", "ServerApp failed with exception: a defect")
    assert _revived(kit, link) == [] and len(link.sent) == 1 and Pending.of(kit, "job") is None
    run = read_run(kit.runs / "job")
    assert (run["status"], run["error"]) == ("failed", "ServerApp failed with exception: a defect")


def test_one_that_somebody_stopped_stays_so(kit: ServerKit, link: Link, config: RunConfig) -> None:
    _reach(kit, config, 1)
    stop(kit, link, "job")  # type: ignore[arg-type]
    assert _revived(kit, link, alone=True) == [] and len(link.sent) == 1
    assert Pending.of(kit, "job") is None and read_run(kit.runs / "job")["status"] == "stopped"


def test_a_process_that_has_not_ended_yet_is_waited_for(kit: ServerKit, link: Link, config: RunConfig) -> None:
    _reach(kit, config, 1)
    link.end("failed", _KILLED)
    with RunDirectory.open(kit.runs / "job"):
        assert _revived(kit, link) == [] and len(link.sent) == 1
    assert len(_revived(kit, link)) == 1 and len(link.sent) == 2


def test_a_job_that_comes_no_further_is_given_up(kit: ServerKit, link: Link, config: RunConfig) -> None:
    for reached in (1, 2):
        _reach(kit, config, reached)
        for _ in range(TRIES):
            link.end("failed", _KILLED)
            assert _revived(kit, link) == [f"job: what ran it has died; it goes on from round {reached + 1}"]
    link.end("failed", _KILLED)
    assert _revived(kit, link) == [
        f"job: its process ended {TRIES + 1} times without coming further; fedgraft job logs job says more; then: "
        "fedgraft job submit CONFIG --resume job"
    ]
    run = read_run(kit.runs / "job")
    assert run["status"] == "failed" and run["error"].startswith(f"its process ended {TRIES + 1} times")
    assert _revived(kit, link) == [] and Pending.of(kit, "job") is None


def test_the_configuration_goes_on_as_it_was_submitted(kit: ServerKit, link: Link, config: RunConfig) -> None:
    kept = Pending.of(kit, "job")
    assert kept is not None and config_from_json(kept.config) == config
    path = kit.state / "jobs" / "job.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("{")
    with pytest.raises(UserError, match=r"job.json: cannot be read; move it away, and resume the job by hand"):
        _revived(kit, link)


def test_a_job_is_written_down_when_it_is_submitted(kit: ServerKit, config: RunConfig) -> None:
    class Listed:
        """A roster of both."""

        @staticmethod
        def current() -> list[Any]:
            return [type("Member", (), {"name": name}) for name in config.site_names]

    kit.roster = Listed  # type: ignore[method-assign,assignment]
    link = Link()
    name, number = submit(kit, link, config, "mine")  # type: ignore[arg-type]
    assert (name, number) == ("mine", 1)
    assert Pending.of(kit, "mine") == Pending("mine", config.to_json())
