"""Where a run is, as its files say while it goes on, after its end, and when its process is gone."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message
from rich.console import Console

from fedgraft.core.errors import UserError
from fedgraft.core.progress import Watch
from fedgraft.core.wire import encode_refusal
from fedgraft.server.watching.page import run_page
from fedgraft.server.watching.progress import FILE, read_progress
from fedgraft.server.watching.snapshot import RunReader, RunView


def printed(view: RunView, width: int = 80) -> list[str]:
    """The page of ``view``, line by line."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(run_page(view))
    return capture.get().splitlines()


@pytest.fixture(scope="module")
def seen(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[RunView]]:
    """A private run, its run.json, and what was seen of it from outside at the start of each phase."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    reader, views = RunReader(folder), []

    class Looking(Watch):
        def phase_started(self, kind: str, round: int, sites: int) -> None:
            views.append(reader.look())

    assert reader.look().status == "absent"
    run = tiny_federation.run(tiny_federation.private(), folder, watch=Looking())
    return folder, run, [*views, reader.look()]


def test_a_run_is_seen_while_it_goes_on(seen: Any) -> None:
    _, _, views = seen
    phases = [(view.status, view.phase.kind, view.phase.round, view.phase.sites) for view in views[:-1]]
    kinds = [("evaluate", 0), *((kind, number) for number in (1, 2, 3) for kind in ("train", "evaluate"))]
    assert phases == [("running", kind, number, 3) for kind, number in kinds]
    assert [view.round for view in views] == [0, 1, 1, 2, 2, 3, 3, 3]
    assert all(0 <= view.phase_seconds() < 60 for view in views)
    # The first is timed by nothing; towards the end less and less is left.
    left = [view.left for view in views[:-1]]
    assert left[:2] == [None, None] and all(value is not None and value >= 0 for value in left[2:])
    assert left[-1] < left[2] and views[-1].left is None


def test_what_is_seen_at_the_end_is_what_run_json_says(seen: Any) -> None:
    folder, run, views = seen
    view = views[-1]
    assert (view.status, view.phase, view.round, view.rounds) == ("finished", None, 3, 3)
    assert not (folder / FILE).exists()
    assert (view.run, view.bytes_up, view.bytes_down) == (run["run"], run["bytes_up"], run["bytes_down"])
    assert (view.accuracy[0], view.accuracy[-1]) == (run["accuracy"]["before"], run["accuracy"]["after"])
    assert len(view.accuracy) == len(view.loss) == 4 and view.epsilon == 2.0
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for site in view.sites:
        told = run["sites"][site.name]
        assert (site.epsilon, site.accuracy, site.answered) == (told["epsilon"], told["accuracy"], told["rounds"])
        assert site.steps == sum(x["sites"][site.name]["steps"] for x in lines if x["kind"] == "train") == 9
        assert site.heard == datetime.fromisoformat(lines[-1]["time"])
        assert (site.asked, dict(site.missed), site.why) == (3, {}, "")
    # A reader that comes late sees the same as one that was there all the time.
    assert RunReader(folder).look() == view


def test_a_site_that_gave_nothing_is_told_of_with_the_reason(tiny_federation: Any, tmp_path: Path) -> None:
    def between(site: str, message: Any, answer: Any) -> Any:
        if site == "north" and message.metadata.message_type == "train":
            return Message(encode_refusal(UserError("gone fishing"), site=site, round=1), reply_to=message)
        return answer()

    config = tiny_federation.config(rounds=1, **{"server.quorum": 2})
    tiny_federation.run(config, tmp_path / "run", between)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # What comes after the last evaluation, to which it did answer, is not there yet.
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    view = RunReader(tmp_path / "run").look()
    north = next(site for site in view.sites if site.name == "north")
    assert (north.answered, north.asked, sum(north.missed.values())) == (0, 1, 1)
    assert north.why == "gone fishing" and north.missed == {"refused": 1} and view.epsilon is None
    assert any("north" in line and "0/1" in line and "1 refused; gone fishing" in line for line in printed(view))


@pytest.mark.parametrize("width", [80, 120])
def test_a_page_fits_the_terminal_and_names_every_site(seen: Any, width: int) -> None:
    _, _, views = seen
    for view in views:
        lines = printed(view, width)
        assert max(len(line.rstrip()) for line in lines) <= width
        assert all(any(line.startswith(site) for line in lines) for site in ("east", "north", "south"))
    assert f"{views[-1].sites[0].epsilon:.2f} of 2" in printed(views[-1])[-3]


def test_a_folder_without_a_run_is_one_clear_line(tmp_path: Path) -> None:
    (line,) = printed(RunReader(Path("nowhere")).look())
    assert line.rstrip() == "nowhere: no run here yet"
    (tmp_path / "run.json").write_text('{"half": ')
    (tmp_path / "metrics.jsonl").write_text('{"half": ')
    assert RunReader(tmp_path).look().status == "absent"


def note(folder: Path, **changes: Any) -> None:
    own = psutil.Process()
    values = {"schema": 1, "host": socket.gethostname(), "process": own.pid, "created": own.create_time()}
    began = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
    values["phase"] = {"kind": "train", "round": 2, "sites": 3, "began": began}
    (folder / FILE).write_text(json.dumps({**values, **changes}))


@pytest.fixture
def killed(seen: Any, tmp_path: Path) -> Path:
    """A copy of the run's files as SIGKILL in round 2 would leave them."""
    folder, run, _ = seen
    (tmp_path / "run.json").write_text(json.dumps({**run, "schema": 1, "status": "running", "finished": ""}))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    return tmp_path


def test_a_run_whose_process_is_gone_is_stopped(killed: Path) -> None:
    note(killed)
    view = RunReader(killed).look()
    assert view.status == "running" and view.phase is not None and 89 < view.phase_seconds() < 600
    assert len(view.seconds["train"]) == 1 and view.round == 2
    note(killed, created=psutil.Process().create_time() - 100, process=1)
    view = RunReader(killed).look()
    assert (view.status, view.phase, view.left) == ("stopped", None, None)
    assert "can be resumed" in "".join(printed(view))
    (killed / FILE).unlink()
    assert RunReader(killed).look().status == "stopped"


def test_a_process_of_another_machine_is_taken_at_its_word(killed: Path) -> None:
    note(killed, host="elsewhere", process=1, created=0.0)
    assert RunReader(killed).look().status == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"phase": 1, "host": 1}', "null", '{"phase": null}'])
def test_a_note_that_is_broken_is_no_note(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert read_progress(tmp_path) is None


def test_a_disk_that_takes_no_note_stops_no_run(tiny_federation: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / f".{FILE}.new").mkdir(parents=True)
    assert tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "run")["status"] == "finished"
