"""A site's worker: what it does not run, what it survives, and what it writes down."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft import __version__
from fedgraft.client.app import app
from fedgraft.client.installed import installed_digest
from fedgraft.client.warm.answerer import Answerer, AnswererDiedError, AnswererLateError
from fedgraft.client.warm.bundle import bundle_hash
from fedgraft.client.warm.runtime import Task
from fedgraft.client.warm.worker import LOCK, Options, Worker, only_worker, serve
from fedgraft.core.errors import UserError
from fedgraft.core.wire import Answer, Job, decode_adapter, decode_answer, encode_adapter
from fedgraft.privacy import Ledger

_SPEC = importlib.util.spec_from_file_location("conversation", Path(__file__).parents[2] / "conversation.py")
assert _SPEC is not None and _SPEC.loader is not None
_CONVERSATION = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CONVERSATION)


def bundle(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in {"pyproject.toml": "", ".info/CONTENT": "", **files}.items():
            archive.writestr(name, text)
    return content.getvalue()


class Handed(Task):
    """A task that keeps what is handed in."""

    def __init__(self, message: Message, context: Context, content: bytes) -> None:
        super().__init__(message, context, content, None, None)  # type: ignore[arg-type]
        self.message = message
        self.replies: list[Message] = []

    def read(self) -> Message:
        return self.message

    def answer(self, reply: Message, context: Context) -> None:
        self.replies.append(reply)
        self.context = context

    def decoded(self, kind: Any) -> Answer:
        (reply,) = self.replies
        return decode_answer(reply.content, kind, "north")


class InThisProcess(Answerer):
    """Answers without a process; before that, raises what is left of ``faults``."""

    def __init__(self, *faults: Exception) -> None:
        super().__init__()
        self.faults = list(faults)
        self.asked: list[float] = []

    def start(self) -> Any:
        return None

    def ask(self, message: Message, context: Context, seconds: float) -> tuple[Message, Context]:
        self.asked.append(seconds)
        if self.faults:
            raise self.faults.pop(0)
        return app(message, context), context


class Site:
    """A site's folder with a policy, its worker, and the tasks that a server of the tiny federation gives it."""

    def __init__(self, config: Any, folder: Path, *faults: Exception, deadline: float = 60.0) -> None:
        self.talk = _CONVERSATION.Conversation(config, folder)
        self.folder = folder
        self.worker = Worker(folder, deadline)
        self.answerer = InThisProcess(*faults)
        self.worker._answerer = self.answerer

    def task(self, kind: str = "query.hello", content: bytes | None = None, **node: str) -> Handed:
        job = Job("r", 1, "", self.talk.config.to_json(), self.talk.model.base.fingerprint)
        records = {"job": job.to_record(), **(encode_adapter(self.talk.state, wire="fp32") if kind == "train" else {})}
        message = Message(RecordDict(records), dst_node_id=2, message_type=kind)
        context = Context(1, 2, {"site": "north", **node}, RecordDict(), {})
        return Handed(message, context, bundle() if content is None else content)

    def answered(self, kind: str = "query.hello", content: bytes | None = None, **node: str) -> Answer:
        task = self.task(kind, content, **node)
        self.worker.answer(task)
        return task.decoded(kind.removeprefix("query."))

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]


@pytest.fixture
def site(tiny_federation: Any, tmp_path: Path) -> Callable[..., Site]:
    return lambda *faults, **more: Site(tiny_federation.config(), tmp_path / "north", *faults, **more)


# What is not run


def test_a_bundle_with_code_is_refused_in_the_audit_log_and_nobody_is_asked(site: Callable[..., Site]) -> None:
    north = site()
    content = bundle(**{"evil.py": "raise SystemExit"})
    answer = north.answered(content=content)
    (line,) = north.log()
    assert "the app bundle" in answer.error and "holds evil.py" in answer.error and answer.site == "north"
    assert (line["event"], line["kind"], line["site"], line["run"]) == ("refused", "hello", "north", "r")
    assert "evil.py" in line["why"] and "bundles" in line["rule"]["text"] and len(line["bundle"]) == 64
    assert north.answerer.asked == []


def test_a_bundle_that_the_policy_lists_is_answered_and_still_not_run(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    north, mark = site(), tmp_path / "ran"
    content = bundle(**{"evil.py": f"open({str(mark)!r}, 'w')", "pyproject.toml": 'clientapp = "evil:app"'})
    text = (north.folder / "policy.toml").read_text() + f'[code]\nbundles = ["{bundle_hash(content)}"]\n'
    (north.folder / "policy.toml").write_text(text)
    assert north.answered(content=content).error == ""
    assert not mark.exists() and "evil" not in sys.modules


def test_the_worker_s_folder_is_the_site_s_whatever_the_node_says(site: Callable[..., Site], tmp_path: Path) -> None:
    north = site()
    assert north.answered().error == "", "the worker fills it in"
    assert north.answered(**{"site-folder": str(north.folder)}).error == ""
    answer = north.answered(**{"site-folder": str(tmp_path / "other")})
    assert answer.error == "its data cannot be used; the site's own log says why"
    assert north.log()[-1]["event"] == "refused" and "which this worker serves" in north.log()[-1]["why"]
    assert len(north.answerer.asked) == 2


def test_without_a_policy_nothing_is_answered(site: Callable[..., Site]) -> None:
    north = site()
    (north.folder / "policy.toml").unlink()
    assert north.answered().error.startswith("the site has no policy, so nothing leaves")
    assert north.answerer.asked == [] and north.log()[-1]["event"] == "refused"


def test_an_instruction_that_is_none_is_refused_by_the_answerer(site: Callable[..., Site]) -> None:
    north = site()
    task = north.task()
    task.message.content = RecordDict({"notes": ConfigRecord({"x": 1})})
    north.worker.answer(task)
    assert "undeclared record `notes`" in task.decoded("hello").error
    assert north.log()[-1]["event"] == "refused"


def test_an_instruction_that_cannot_be_read_is_refused_in_the_audit_log(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    north = site()
    task = north.task()

    def unreadable() -> Message:
        raise UserError("the instruction cannot be read: it takes more than 9 bytes")

    monkeypatch.setattr(task, "read", unreadable)
    north.worker.answer(task)
    assert task.decoded("hello").error == "the instruction cannot be read: it takes more than 9 bytes"
    assert (north.log()[-1]["event"], north.log()[-1]["site"]) == ("refused", "north")
    assert north.answerer.asked == []


def test_what_serves_from_now_on_is_written_down(site: Callable[..., Site]) -> None:
    north = site()
    north.worker.begin()
    assert north.answered().error == ""
    code = {"version": __version__, "sha256": installed_digest()}
    assert (north.log()[0]["event"], north.log()[0]["did"], north.log()[0]["code"]) == ("worker", "started", code)


# What it survives


def test_an_answerer_that_dies_is_started_again_and_the_round_is_not_lost(site: Callable[..., Site]) -> None:
    north = site(AnswererDiedError("the site's answerer died: it was killed (signal 9)"))
    assert north.answered("train").error == ""
    again = [line for line in north.log() if line["event"] == "worker"]
    assert len(north.answerer.asked) == 2
    assert [(line["did"], line["kind"], line["round"]) for line in again] == [
        ("started the answerer again", "train", 1)
    ]


def test_an_answerer_that_dies_twice_makes_one_clear_line(site: Callable[..., Site], caplog: Any) -> None:
    north = site(*(AnswererDiedError("the site's answerer died: memory") for _ in range(2)))
    assert north.answered("train").error == "the site's answerer died: memory"
    assert len(north.answerer.asked) == 2
    assert [line["event"] for line in north.log()] == ["worker", "refused"]
    assert not any(record.exc_info for record in caplog.records)


def test_an_answer_that_is_late_is_not_asked_for_again(site: Callable[..., Site]) -> None:
    north = site(AnswererLateError("the site's answerer gave no answer within 60 s"))
    assert "no answer within 60 s" in north.answered("train").error
    assert len(north.answerer.asked) == 1 and [line["event"] for line in north.log()] == ["refused"]


@pytest.mark.parametrize(("age", "ttl", "least", "most"), [(0, 30, 20, 30), (0, 4e4, 59, 60), (9e9, 30, 59, 60)])
def test_an_answer_may_take_as_long_as_somebody_waits_and_no_longer_than_the_deadline(
    site: Callable[..., Site], age: float, ttl: float, least: float, most: float
) -> None:
    north = site()
    task = north.task()
    task.message.metadata.__dict__["_created_at"] = time.time() - age
    task.message.metadata.ttl = ttl
    north.worker.answer(task)
    (seconds,) = north.answerer.asked
    assert least <= seconds <= most


def test_where_the_audit_log_cannot_be_written_the_refusal_says_so(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    north = site(AnswererLateError("late"))

    def full(event: str, **values: Any) -> None:
        raise UserError(f"{north.folder}/audit.jsonl: the audit log cannot be written, so nothing leaves: disk full")

    monkeypatch.setattr(north.worker._audit_log, "write", full)
    assert north.answered().error == "audit.jsonl: the audit log cannot be written, so nothing leaves: disk full"


def test_a_fault_of_the_worker_itself_is_answered_too(site: Callable[..., Site]) -> None:
    north = site(KeyError("jane doe"))
    assert north.answered().error == "KeyError at the site; the site's own log says more"
    assert north.log()[-1]["why"] == "KeyError"


# One worker a folder


def test_a_second_worker_on_a_folder_is_turned_away_and_the_first_named(tmp_path: Path) -> None:
    with only_worker(tmp_path):
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600
        with (
            pytest.raises(UserError, match=f"another worker .process {os.getpid()}. serves this site"),
            only_worker(tmp_path),
        ):
            raise AssertionError("two workers")
    with only_worker(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: (folder / "secret").unlink(), "the secret cannot be read"),
        (lambda folder: (folder / "secret").write_bytes(b""), "the secret is empty"),
        (lambda folder: (folder / "site").rmdir(), "no such folder"),
    ],
)
def test_a_worker_that_cannot_begin_says_why(tmp_path: Path, change: Callable[[Path], Any], why: str) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "site").mkdir()
    change(tmp_path)
    with pytest.raises(UserError, match=why):
        serve(Options(tmp_path / "site", "127.0.0.1:1", tmp_path / "secret"))


# The process that answers


@pytest.fixture
def real() -> Iterator[Answerer]:
    answerer = Answerer()
    yield answerer
    answerer.stop()


def test_the_answerer_answers_as_this_process_would_and_keeps_what_is_costly(
    site: Callable[..., Site], real: Answerer
) -> None:
    north = site()
    expected = north.task("train")
    north.worker.answer(expected)
    north.worker._answerer = real
    given = north.task("train")
    north.worker.answer(given)
    assert given.decoded("train").error == "" and set(given.context.state) == set(expected.context.state)
    states = [
        decode_adapter(task.replies[0].content, north.talk.state.spec, sender="north") for task in (given, expected)
    ]
    assert (states[0] - states[1]).norm() <= 1e-5 and (states[0] - north.talk.state).norm() > 0
    process, began = real.pid, time.process_time()
    again = north.task("evaluate")
    again.message.content.update(encode_adapter(north.talk.state, wire="fp32"))
    north.worker.answer(again)
    assert again.decoded("evaluate").metrics["examples"] > 0
    assert real.pid == process and time.process_time() - began < 5
    assert "of the kind `query.gossip` is not answered here" in north.answered("query.gossip").error
    assert real.pid == process and north.log()[-1]["event"] == "refused"


@pytest.mark.slow
def test_a_killed_answerer_s_round_is_trained_again_and_counts_once(
    tiny_federation: Any, tmp_path: Path, real: Answerer
) -> None:
    config = tiny_federation.private(**{"privacy.epsilon": 8.0, "train.local_steps": 150})
    north = Site(config, tmp_path / "north", deadline=500.0)
    north.worker._answerer = real
    ledger = Ledger(north.folder / "ledgers")
    killed = threading.Event()

    def kill() -> None:
        while not ledger.events():
            time.sleep(0.05)
        os.kill(real.pid or 0, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    task = north.task("train")
    north.worker.answer(task)
    answer = task.decoded("train")
    assert killed.is_set()
    assert [line["event"] for line in north.log()] == ["allowed", "worker", "allowed", "left"], answer.error
    (entry,) = ledger.entries()
    assert (entry.steps, entry.outcome, entry.resumed) == (150, "released", 1)
    assert answer.privacy is not None and answer.privacy.steps == 150
    assert north.log()[-1]["resumed"] is True


@pytest.mark.slow
def test_an_answerer_that_stands_still_is_ended_at_the_deadline(site: Callable[..., Site], real: Answerer) -> None:
    north = site(deadline=2.0)
    real.start()
    stuck = real.pid or 0
    os.kill(stuck, signal.SIGSTOP)
    north.worker._answerer = real
    assert "gave no answer within 2 s and was ended" in north.answered().error
    assert not Path(f"/proc/{stuck}").exists() and real.pid is None


@pytest.mark.slow
def test_the_answerer_ends_with_its_worker() -> None:
    """Also one that is killed, and so can tell it nothing."""
    code = (
        "import time, sys; from fedgraft.client.warm.answerer import Answerer; a = Answerer(); a.start(); "
        "print(a.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(1)
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
