"""A process that is killed leaves its attempt behind: it is done again to the bit and paid for once, or paid for anew.

Processes are really killed here: a fork of this one, by SIGKILL, from inside the function that a kill point names.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.client import app as client_app
from fedgraft.client import attempt as attempts
from fedgraft.client import holdings, keptanswers
from fedgraft.client.surroundings import Surroundings
from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.progress import Watch
from fedgraft.core.wire import encode_adapter
from fedgraft.privacy import Ledger
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.noise import RandomStream

Talk = Callable[..., Any]
#: Where a process is killed, and how many reservations there are once the round has been asked for again.
POINTS = {
    "before the reservation": 1,
    "after the reservation": 1,
    "in the second step": 1,
    "before the settlement": 2,
    "after the settlement": 2,
    "before the answer is kept": 2,
    "after the answer is kept": 1,
}


class Dying(Watch):
    """Ends this process in the second step."""

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        if step == 2:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies(owner: Any, name: str, *, before: bool) -> None:
    """From now on, in this process, ``owner.name`` is the last that is called."""
    whole = getattr(owner, name)

    def deadly(*args: Any, **named: Any) -> Any:
        if not before:
            whole(*args, **named)
        _die()

    setattr(owner, name, deadly)


def _arm(point: str) -> Watch:
    """Have this process die at ``point``."""
    if point == "in the second step":
        return Dying()
    when, what = point.split(" the ")
    owner, name = {
        "reservation": (Ledger, "reserve"),
        "settlement": (Ledger, "settle"),
        "answer is kept": (keptanswers.KeptAnswer, "keep"),
    }[what]
    _dies(owner, name, before=when == "before")
    return Watch()


@pytest.fixture
def talk(tiny_federation: Any, tmp_path: Path, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A conversation with a site whose process has just been started."""
    given: list[AdapterState] = []

    def begin(folder: str = "north", **changes: Any) -> Any:
        monkeypatch.setattr(conversation, "app", client_app.make_client_app(client_app.DEPLOYED))
        fixed = {"privacy.noise_multiplier": 4.0, "evaluate.release": "none", **changes}
        site = conversation.Conversation(tiny_federation.private(**fixed), tmp_path / folder)
        site.state = (given or [site.state])[0]
        given.append(site.state)
        return site

    return begin


@contextmanager
def _forked(doing: Callable[[], Any]) -> Iterator[None]:
    """Another process that is at ``doing``; dead afterwards."""
    child = os.fork()
    if child == 0:
        try:
            doing()
        finally:
            os._exit(3)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it came to an end of its own"


def _killed(conversation: ModuleType, point: str, ask: Callable[[], Any]) -> None:
    """Have another process answer, and die at ``point``."""

    def doomed() -> None:
        conversation.app = client_app.make_client_app(client_app.DEPLOYED, _arm(point))
        ask()

    child = os.fork()
    if child == 0:
        try:
            doomed()
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"nobody died {point}"


def _bytes(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def _update(content: RecordDict) -> bytes:
    """What of an answer is drawn: all but what the site says of its budget."""
    return _bytes(RecordDict({"adapter": content["adapter"]}))


def _entries(site: Any) -> list[tuple[str, int]]:
    """Outcome, and how often it was taken up again, of each reservation."""
    return [(entry.outcome, entry.resumed) for entry in Ledger(site.folder / "ledgers").entries()]


def _lines(site: Any) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in sorted((site.folder / "ledgers").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def _naive(site: Any) -> float:
    """What all reservations come to, by the plain reading of the lines."""
    reserved = [line for line in _lines(site) if line["kind"] == "reserve"]
    return epsilon(tuple(Event.from_dict(event) for line in reserved for event in line["events"]), 1e-3)


def _left_behind(site: Any, kind: str = "train") -> dict[str, str]:
    return json.loads((site.folder / "attempts" / kind).read_text())


def _drawn_from(key: bytes, patch: pytest.MonkeyPatch) -> None:
    """Attempts draw from ``key``."""
    urandom = os.urandom
    patch.setattr(os, "urandom", lambda size: key if size == len(key) else urandom(size))


@pytest.mark.parametrize("point", POINTS)
def test_a_training_that_was_killed_is_paid_for_once_if_nothing_had_been_settled_and_never_less(
    talk: Talk, conversation: ModuleType, point: str
) -> None:
    site = talk()
    _killed(conversation, point, site.train)
    answer, _ = site.train()
    resumed = point in ("after the reservation", "in the second step")
    assert answer.error == "" and len(_entries(site)) == POINTS[point]
    assert _entries(site)[-1] == ("released", int(resumed)) and site.log()[-1].get("resumed") is (resumed or None)
    assert answer.privacy.epsilon == pytest.approx(_naive(site), rel=1e-12)
    assert answer.privacy.steps == 3 * POINTS[point]
    assert (site.folder / "attempts" / "train").read_bytes() == b"", "no key of what has left"


def test_what_is_taken_up_again_is_what_would_have_been_to_the_bit(
    talk: Talk, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, other = talk(), talk("other")
    _killed(conversation, "in the second step", site.train)
    key = bytes.fromhex(_left_behind(site)["key"])
    _, done_again = site.train()
    with monkeypatch.context() as patch:
        _drawn_from(key, patch)
        _, never_killed = other.train()
    _, fresh = talk("third").train()
    assert _update(done_again) == _update(never_killed) != _update(fresh)


def test_an_attempt_is_taken_up_again_as_often_as_it_is_killed(talk: Talk, conversation: ModuleType) -> None:
    site = talk()
    for _ in range(3):
        _killed(conversation, "in the second step", site.train)
    assert _entries(site) == [("", 2)]
    assert site.train()[0].error == "" and _entries(site) == [("released", 3)]
    result = CliRunner().invoke(app, ["privacy", "ledger", "show", str(site.folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "released, taken up again 3 times" in result.output, result.output
    assert CliRunner().invoke(app, ["privacy", "ledger", "verify", str(site.folder)]).exit_code == 0


def test_a_run_whose_every_round_was_killed_spends_its_budget_like_any_other(
    talk: Talk, conversation: ModuleType
) -> None:
    """Its noise is chosen so that the last round leaves nothing: one reservation more would not fit."""
    changes = {"privacy.noise_multiplier": 0.0, "rounds": 2}
    site, other = talk(**changes), talk("other", **changes)
    for number in (1, 2):
        _killed(conversation, "in the second step", lambda number=number: site.train(number))
        assert site.train(number)[0].error == other.train(number)[0].error == ""
    events = [Ledger(each.folder / "ledgers").events() for each in (site, other)]
    assert events[0] == events[1] and 1.9 < epsilon(events[0], 1e-3) <= 2.0
    assert _entries(site) == [("released", 1)] * 2


@pytest.mark.parametrize("release", ["after the reservation", "before the settlement", "after the settlement"])
def test_noised_counts_that_were_killed_are_paid_for_once_if_they_are_the_same(
    talk: Talk, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    changes = {"evaluate.release": "noised", "evaluate.epsilon": 8.0, "privacy.epsilon": 8.0}
    site, other = talk(**changes), talk("other", **changes)
    _killed(conversation, release, site.evaluate)
    content = (site.folder / "attempts" / "evaluate").read_text()
    counts = site.evaluate()
    assert counts.error == "" and (site.folder / "attempts" / "evaluate").read_bytes() == b""
    if release != "after the reservation":
        assert len(_entries(site)) == 2 and content == ""
        return
    assert _entries(site) == [("released", 1)]
    with monkeypatch.context() as patch:
        _drawn_from(bytes.fromhex(json.loads(content)["key"]), patch)
        assert other.evaluate().metrics == counts.metrics


def _moved(site: Any) -> RecordDict:
    state = AdapterState(site.state.spec, {name: array * 2 for name, array in site.state.items()})
    return encode_adapter(state, wire="fp32")


@pytest.mark.parametrize("what", ["adapter", "round", "run", "configuration", "data", "boot", "code", "spent between"])
def test_an_attempt_at_anything_else_is_paid_for_anew(
    talk: Talk,
    conversation: ModuleType,
    tiny_federation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    table = tmp_path / "records.csv"
    table.write_bytes(tiny_federation.table.read_bytes())
    changes = {"data.path": str(table), "privacy.epsilon": 8.0}
    site = talk(**changes)
    _killed(conversation, "in the second step", site.train)
    if what == "configuration":
        site = talk(**changes, **{"train.lr": 0.05})
    if what == "data":
        table.write_text("\n".join(table.read_text().splitlines()[:-5]) + "\n")
        site = talk(**changes)
    if what == "boot":
        (tmp_path / "boot").write_text("another")
        monkeypatch.setattr(attempts, "_BOOT", tmp_path / "boot")
    if what == "code":
        monkeypatch.setattr(attempts, "installed_digest", lambda: "another")
    if what == "spent between":
        (file,) = (site.folder / "ledgers").glob("*.jsonl")
        entry = Ledger(site.folder / "ledgers").entries()[0]
        ledger = Ledger(site.folder / "ledgers", entry.fingerprint, dataset=entry.dataset, unit=entry.unit)
        ledger.reserve(Event(9.0, 0.5, 1), split=entry.split, run="another")
        assert ledger.path == file
    content = _moved(site) if what == "adapter" else None
    more = {"run": "s"} if what == "run" else {}
    answer, _ = site.train(2 if what == "round" else 1, content, **more)
    assert answer.error == "" and "resumed" not in site.log()[-1]
    counted = 3 if what == "spent between" else 2
    assert len(_entries(site)) == counted and all(resumed == 0 for _, resumed in _entries(site))
    assert answer.privacy.epsilon == pytest.approx(_naive(site), rel=1e-12)


def test_an_attempt_whose_process_still_lives_is_left_alone_and_paid_for_beside(
    talk: Talk, conversation: ModuleType, tmp_path: Path
) -> None:
    site, mark = talk(**{"privacy.epsilon": 8.0}), tmp_path / "at work"

    class Slow(Watch):
        def site_step(self, *_: Any) -> None:
            mark.touch()
            time.sleep(60)

    def slowly() -> None:
        conversation.app = client_app.make_client_app(client_app.DEPLOYED, Slow())
        site.train()

    with _forked(slowly):
        until = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < until, "it did not begin"
            time.sleep(0.02)
        left = _left_behind(site)
        assert site.train()[0].error == ""
        assert _entries(site) == [("", 0), ("released", 0)] and _left_behind(site) == left
    # Now it is dead; but the round is answered.
    assert site.train()[0].error == "" and site.log()[-1]["repeated"] is True
    assert _entries(site) == [("", 0), ("released", 0)]


def test_a_training_that_failed_is_not_taken_up_again(
    talk: Talk, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = talk(**{"privacy.epsilon": 8.0})

    class Failing(Watch):
        def site_step(self, site: str, step: int, *_: Any) -> None:
            if step == 2:
                raise UserError("the device is gone")

    monkeypatch.setattr(conversation, "app", client_app.make_client_app(client_app.DEPLOYED, Failing()))
    assert site.train()[0].error == "the device is gone"
    assert (site.folder / "attempts" / "train").read_bytes() == b""
    monkeypatch.setattr(conversation, "app", client_app.make_client_app(client_app.DEPLOYED))
    assert site.train()[0].error == ""
    assert _entries(site) == [("failed", 0), ("released", 0)]
    assert [line["steps"] for line in _lines(site) if line["kind"] == "settle"] == [3, 3]


def test_what_was_killed_and_then_failed_counts_whole(
    talk: Talk, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far the first came nobody knows."""
    site = talk()
    _killed(conversation, "in the second step", site.train)

    class Failing(Watch):
        def site_step(self, *_: Any) -> None:
            raise UserError("the device is gone")

    monkeypatch.setattr(conversation, "app", client_app.make_client_app(client_app.DEPLOYED, Failing()))
    assert site.train()[0].error == "the device is gone"
    assert [(line["steps"], line["outcome"]) for line in _lines(site) if line["kind"] == "settle"] == [(3, "failed")]


def test_a_policy_that_allows_less_by_now_lets_nothing_be_taken_up(talk: Talk, conversation: ModuleType) -> None:
    site = talk()
    _killed(conversation, "in the second step", site.train)
    policy = site.folder / "policy.toml"
    text = policy.read_text()
    for key, allowed, now in (("max_epsilon_per_year", "inf", 0.01), ("max_delta", 0.999999999, 1e-3)):
        assert f"{key} = {allowed}" in text
        text = text.replace(f"{key} = {allowed}", f"{key} = {now}")
    policy.write_text(text)
    refused, content = site.train()
    assert "epsilon" in refused.error and set(content) == {"site"} and _entries(site) == [("", 0)]


def test_the_key_of_an_attempt_is_for_its_owner_alone_and_not_in_the_ledger(
    talk: Talk, conversation: ModuleType
) -> None:
    site = talk()
    _killed(conversation, "in the second step", site.train)
    path, left = site.folder / "attempts" / "train", _left_behind(site)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for file in site.folder.rglob("*"):
        assert file == path or not file.is_file() or left["key"] not in file.read_text(errors="replace"), file
    assert _lines(site)[0]["attempt"] == left["name"] and RandomStream(bytes.fromhex(left["key"])).words(1)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'"x"', b"\xff", b"null"])
def test_a_damaged_attempt_is_none(talk: Talk, conversation: ModuleType, damage: bytes) -> None:
    site = talk(**{"privacy.epsilon": 8.0})
    _killed(conversation, "in the second step", site.train)
    (site.folder / "attempts" / "train").write_bytes(damage)
    assert site.train()[0].error == "" and _entries(site) == [("", 0), ("released", 0)]


def test_an_attempt_that_cannot_be_kept_costs_nothing(talk: Talk, tmp_path: Path) -> None:
    site = talk()
    (site.folder / "attempts").write_text("in the way")
    refused, content = site.train()
    assert "attempts: cannot be made a folder" in refused.error and set(content) == {"site"}
    assert not (site.folder / "ledgers").exists()


@pytest.mark.parametrize("point", ["after the reservation", "in the second step"])
@pytest.mark.parametrize("sampler", ["cyclic", "poisson"])
def test_units_that_come_in_turn_have_the_same_turns_and_noise_again(
    talk: Talk, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch, sampler: str, point: str
) -> None:
    changes = {"privacy.sampler": sampler, "privacy.bands": 4, "privacy.epsilon": 50.0}
    site, other = talk(**changes), talk("other", **changes)
    answers = []
    for number in (1, 2):
        _killed(conversation, point, lambda number=number: site.train(number))
        key = bytes.fromhex(_left_behind(site)["key"])
        answer, content = site.train(number)
        assert answer.error == ""
        if number == 1:
            (noise,) = (json.loads(path.read_text())["key"] for path in (site.folder / "noise").glob("*.json"))
        with monkeypatch.context() as patch:
            _drawn_from(key, patch)
            patch.setattr(holdings, "site_key", lambda *_, noise=noise, **__: bytes.fromhex(noise))
            answers.append((content, other.train(number)[1]))
    assert all(_update(one) == _update(two) for one, two in answers)
    assert _entries(site) == [("released", 1)] * 2 and _entries(other) == [("released", 0)] * 2
    events = [Ledger(each.folder / "ledgers").events() for each in (site, other)]
    assert events[0] == events[1]


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(deaths=st.lists(st.lists(st.sampled_from(sorted(POINTS)), max_size=2), min_size=2, max_size=2))
def test_whatever_dies_and_whenever_each_training_that_left_is_counted(
    talk: Talk, conversation: ModuleType, deaths: list[list[str]]
) -> None:
    site = talk(f"site-{time.monotonic_ns()}", **{"privacy.epsilon": 50.0})
    left: set[bytes] = set()
    for number, points in enumerate(deaths, 1):
        answered = False
        for point in points:
            if not answered:
                _killed(conversation, point, lambda number=number: site.train(number))
            answered |= point == "after the answer is kept"
        answer, content = site.train(number)
        assert answer.error == ""
        left.add(_update(content))
        # The last reservation of the round is that of what left.
        paid = [line for line in _lines(site) if line["kind"] == "reserve" and line["round"] == number]
        done = [line["id"] for line in _lines(site) if line["kind"] == "settle" and line["outcome"] == "released"]
        assert paid[-1]["id"] in done
    reserved = [line for line in _lines(site) if line["kind"] == "reserve"]
    lost = sum(POINTS[point] - 1 for points in deaths for point in _before_the_answer(points))
    assert len(left) == len(deaths) <= len(reserved) == len(deaths) + lost
    assert answer.privacy.epsilon == pytest.approx(_naive(site), rel=1e-12)


def _before_the_answer(points: list[str]) -> list[str]:
    kept = "after the answer is kept"
    return points[: points.index(kept)] if kept in points else points


def test_simulated_sites_leave_no_attempts(tiny_federation: Any, tmp_path: Path) -> None:
    tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / "run")
    assert list(tmp_path.glob("run/sites/*/ledgers/*.jsonl")) and not list(tmp_path.rglob("attempts"))
    assert Surroundings.keeps is False
