"""The ledger counts every noisy step on a site's data, whatever happens, and lets nobody spend more than allowed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.ledger import Ledger, Limit, OverspentError, Reservation, ledger_file

EVENTS = (Event(1.0, 0.1, 6), Event(1.0 / 3.0, 100 / 1234, 5), Event(1.5, 1.0, 1))
DATA, CHANGED = "ab" * 32, "cd" * 32
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DELTA = 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledgers"


def ledger(folder: Path | None, data: str = DATA, *, now: datetime = NOW, **more: Any) -> Ledger:
    return Ledger(folder, data, clock=lambda: now, **more)


def written(folder: Path) -> list[Reservation]:
    return [ledger(folder).reserve(event, run="run-1", round=number) for number, event in enumerate(EVENTS)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def naive(found: list[dict[str, Any]], part: str = "", split: str = "", year: int = 0) -> tuple[Event, ...]:
    """What a unit in ``part`` of ``split`` paid, by the plain reading of the lines."""
    events: list[Event] = []
    for line in found:
        if line["kind"] != "reserve" or (year and not line["time"].startswith(str(year))):
            continue
        if split and line["split"] == split and line["part"] != part:
            continue
        settled = [other for other in found if other["kind"] == "settle" and other["id"] == line["id"]]
        if settled and line["independent"]:
            if settled[0]["steps"]:
                events.append(Event.from_dict({**line["events"][0], "steps": settled[0]["steps"]}))
        else:
            events += [Event.from_dict(event) for event in line["events"]]
    return tuple(events)


# What was reserved


@pytest.mark.parametrize("in_memory", [True, False])
def test_events_come_back_exactly_and_in_order(folder: Path, in_memory: bool) -> None:
    book = ledger(None if in_memory else folder)
    assert book.events() == ()
    for number, event in enumerate(EVENTS, 1):
        book.reserve(event, run="run-1", round=number)
        assert book.events() == EVENTS[:number]
    assert folder.exists() != in_memory


def test_another_process_reads_what_the_first_wrote(folder: Path) -> None:
    written(folder)
    assert ledger(folder).events() == Ledger(str(folder)).events() == EVENTS


def test_an_entry_says_what_it_was_spent_on_and_when(folder: Path) -> None:
    written(folder)
    entries = ledger(folder).entries()
    assert [(entry.about["run"], entry.about["round"]) for entry in entries] == [
        ("run-1", 0),
        ("run-1", 1),
        ("run-1", 2),
    ]
    assert {entry.time for entry in entries} == {NOW}
    assert lines(folder)[0]["time"] == "2026-11-22T12:00:00.000+00:00"


@pytest.mark.parametrize("word", ["kind", "id", "time", "dataset", "outcome", "before", "sha256", "unit"])
def test_what_it_was_spent_on_cannot_change_what_was_spent(folder: Path, word: str) -> None:
    about: dict[str, Any] = {word: 1}
    with pytest.raises(ValueError, match=word):
        ledger(folder).reserve(EVENTS[0], **about)


def test_an_event_of_a_cut_down_sample_comes_back_whole(folder: Path) -> None:
    event = Event(1.0, 0.1, 6, units=100, max_batch=20)
    ledger(folder).reserve(event)
    assert ledger(folder).events() == (event,)


def test_without_the_datas_fingerprint_nothing_is_spent(folder: Path) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        Ledger(folder).reserve(EVENTS[0])
    with pytest.raises(ValueError, match="SHA-256"):
        Ledger(folder, "../../elsewhere")


def test_the_file_is_named_by_the_data_and_for_its_owner_alone(folder: Path) -> None:
    written(folder)
    assert [file.name for file in sorted(folder.iterdir())] == [".lock", f"{DATA[:16]}.jsonl"]
    assert ledger(folder).path == folder / f"{DATA[:16]}.jsonl"
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_the_head_is_the_hash_of_the_last_line(folder: Path) -> None:
    assert ledger(folder).head == ""
    first, *_, last = written(folder)
    assert ledger(folder).head == last.line == lines(folder)[-1]["sha256"]
    told = ledger(folder).settle(first, 6, "released")
    assert ledger(folder).head == told == lines(folder)[-1]["sha256"]
    # Of data that nothing was spent on, that of the last line anywhere.
    assert ledger(folder, CHANGED).head == told
    other = ledger(folder, CHANGED).reserve(EVENTS[0])
    assert (ledger(folder, CHANGED).head, ledger(folder).head) == (other.line, told)


# What became of it


@pytest.mark.parametrize("outcome", ["released", "failed"])
@pytest.mark.parametrize("taken", [0, 1, 6])
@pytest.mark.parametrize("in_memory", [True, False])
def test_steps_that_never_ran_are_given_back(folder: Path, taken: int, outcome: Any, in_memory: bool) -> None:
    book = ledger(None if in_memory else folder)
    reserved = book.reserve(EVENTS[0])
    book.reserve(EVENTS[1])
    book.settle(reserved, taken, outcome)
    want = (Event(1.0, 0.1, taken), EVENTS[1]) if taken else (EVENTS[1],)
    assert book.events() == want
    first, second = book.entries()
    assert (first.taken, first.outcome) == (taken, outcome)
    assert (second.taken, second.outcome) == (None, "")


def test_more_than_was_reserved_is_never_settled(folder: Path) -> None:
    reserved = ledger(folder).reserve(EVENTS[0])
    before = lines(folder)
    for steps in (7, -1, True, 2.0):
        with pytest.raises(ValueError, match="of 6 that were reserved"):
            ledger(folder).settle(reserved, steps, "failed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither released nor failed"):
        ledger(folder).settle(reserved, 1, "forgotten")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not reserved here"):
        ledger(folder).settle(Reservation("f" * 32, 6, ""), 1, "failed")
    with pytest.raises(ValueError, match="not reserved here"):
        ledger(folder, CHANGED).settle(reserved, 1, "failed")
    assert lines(folder) == before


def test_nothing_is_settled_twice(folder: Path) -> None:
    reserved = ledger(folder).reserve(EVENTS[0])
    ledger(folder).settle(reserved, 4, "failed")
    for steps in (0, 4, 6):
        with pytest.raises(ValueError, match="settled already"):
            ledger(folder).settle(reserved, steps, "failed")
    assert ledger(folder).events() == (Event(1.0, 0.1, 4),)


@pytest.mark.parametrize("events", [(EVENTS[0],), EVENTS[:2], ()])
def test_steps_that_share_their_noise_count_whole(folder: Path, events: tuple[Event, ...]) -> None:
    reserved = ledger(folder).reserve(events, steps=9, run="r")
    ledger(folder).settle(reserved, 0, "failed")
    assert ledger(folder).events() == events


def test_a_step_of_a_run_is_never_numbered_twice(folder: Path) -> None:
    book = ledger(folder)
    for number in range(3):
        reserved = book.reserve((), steps=4, run="r", round=number)
    book.settle(reserved, 0, "failed")
    book.reserve(EVENTS[0], run="r", part="held-out")
    book.reserve(EVENTS[0], run="other")
    assert (book.steps_reserved("r"), book.steps_reserved("other"), book.steps_reserved("none")) == (12, 6, 0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_taken_up_again_counts_once_and_whole_until_it_is_settled(folder: Path, in_memory: bool) -> None:
    book = ledger(None if in_memory else folder)
    book.reserve(EVENTS[1], run="r", steps=5)
    first = book.reserve(EVENTS[0], run="r", attempt="a")
    book.reserve(EVENTS[2], run="r")
    for again in (1, 2):
        reserved = book.resume(first.id)
        assert (reserved.id, reserved.steps, reserved.first_step) == (first.id, 6, 6)
        assert book.events() == (EVENTS[1], EVENTS[0], EVENTS[2])
        assert [entry.resumed for entry in book.entries()] == [0, again, 0]
        assert book.steps_reserved("r") == 12 and book.steps_reserved("r", without=first.id) == 6
        assert book.spent("train", "s", without=first.id) == (EVENTS[1], EVENTS[2])
    book.settle(reserved, 4, "failed")
    assert book.events() == (EVENTS[1], Event(1.0, 0.1, 4), EVENTS[2])


def test_what_is_settled_or_of_other_data_is_not_taken_up_again(folder: Path) -> None:
    reserved = [ledger(folder).reserve(EVENTS[0], attempt=name) for name in "ab"]
    assert ledger(folder).unsettled("a") == ledger(folder).entries()[0]
    assert ledger(folder, CHANGED).unsettled("a") is None and ledger(folder).unsettled("c") is None
    for outcome, each in zip(("released", "failed"), reserved, strict=True):
        ledger(folder).settle(each, 6, outcome)  # type: ignore[arg-type]
    before = lines(folder)
    for each in reserved:
        with pytest.raises(ValueError, match="settled already"):
            ledger(folder).resume(each.id)
    with pytest.raises(ValueError, match="not reserved here"):
        ledger(folder, CHANGED).resume(reserved[0].id)
    with pytest.raises(ValueError, match="not reserved here"):
        ledger(folder).resume("f" * 32)
    assert lines(folder) == before and ledger(folder).unsettled("a") is ledger(folder).unsettled("b") is None


def test_what_no_limit_allows_any_more_or_a_clock_that_is_behind_takes_nothing_up_again(folder: Path) -> None:
    reserved = ledger(folder).reserve(EVENTS[0])
    spent = epsilon(EVENTS[:1], DELTA)
    before = lines(folder)
    with pytest.raises(OverspentError, match="the policy"):
        ledger(folder).resume(reserved.id, limits=[Limit(spent * 0.99, DELTA, "the policy")])
    with pytest.raises(UserError, match="this machine's clock is behind"):
        ledger(folder, now=NOW - timedelta(hours=1)).resume(reserved.id)
    assert lines(folder) == before
    ledger(folder).resume(reserved.id, limits=[Limit(spent, DELTA, "the policy")])


@pytest.mark.parametrize("nothing", [{"events": ()}, {"events": (), "steps": 0}, {"events": EVENTS[0], "steps": -1}])
def test_nothing_is_not_reserved(folder: Path, nothing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to reserve"):
        ledger(folder).reserve(nothing.pop("events"), **nothing)
    assert not folder.exists() or not lines(folder)


# Composition


def test_events_of_several_runs_compose(folder: Path) -> None:
    written(folder)
    assert ledger(folder).total(DELTA, "") == epsilon(EVENTS, DELTA) > epsilon(EVENTS[:1], DELTA)


def test_a_changed_record_does_not_forget_the_past(folder: Path) -> None:
    ledger(folder, dataset="letters").reserve(EVENTS[0])
    after = ledger(folder, CHANGED, dataset="letters")
    assert after.events() == EVENTS[:1]
    after.reserve(EVENTS[1])
    assert sorted(file.name for file in folder.glob("*.jsonl")) == [f"{DATA[:16]}.jsonl", f"{CHANGED[:16]}.jsonl"]
    assert ledger(folder, dataset="letters").events() == after.events() == EVENTS[:2]
    # Without a name everything counts.
    assert ledger(folder, "ef" * 32).events() == EVENTS[:2]


def test_datasets_of_other_names_have_budgets_of_their_own(folder: Path) -> None:
    ledger(folder, DATA, dataset="letters").reserve(EVENTS[0])
    assert ledger(folder, CHANGED, dataset="scans").events() == ()
    ledger(folder, CHANGED, dataset="scans").reserve(EVENTS[1])
    assert ledger(folder, DATA, dataset="letters").events() == EVENTS[:1]


def test_the_same_data_under_another_name_are_the_same_data(folder: Path) -> None:
    ledger(folder, DATA, dataset="letters").reserve(EVENTS[0])
    assert ledger(folder, DATA, dataset="renamed").events() == EVENTS[:1]


def test_what_was_spent_without_a_name_counts_for_every_name(folder: Path) -> None:
    ledger(folder, DATA).reserve(EVENTS[0])
    assert ledger(folder, CHANGED, dataset="scans").events() == EVENTS[:1]


def test_two_parts_of_one_split_compose_in_parallel_and_all_else_in_sequence(folder: Path) -> None:
    book = ledger(folder)
    book.reserve(EVENTS[0], part="train", split="s")
    book.reserve(EVENTS[2], part="held-out", split="s")
    assert book.spent("train", "s") == EVENTS[:1]
    assert book.spent("held-out", "s") == EVENTS[2:]
    assert book.spent("train", "another") == book.spent("train", "") == (EVENTS[0], EVENTS[2])
    assert book.total(DELTA, "s") == max(epsilon(EVENTS[:1], DELTA), epsilon(EVENTS[2:], DELTA))
    assert book.total(DELTA, "another") == epsilon((EVENTS[0], EVENTS[2]), DELTA)
    book.reserve(EVENTS[1], part="train", split="another")
    assert book.spent("train", "another") == (EVENTS[0], EVENTS[2], EVENTS[1])
    assert book.spent("held-out", "another") == (EVENTS[0], EVENTS[2])
    assert book.spent("held-out", "s") == (EVENTS[2], EVENTS[1])


_SPENDING = st.tuples(
    st.sampled_from([DATA, CHANGED]),
    st.sampled_from(["train", "held-out"]),
    st.sampled_from(["", "s", "t"]),
    st.sampled_from([Event(2.0, 0.1, 3), Event(4.0, 1.0, 1), Event(3.0, 0.3, 2)]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([2025, 2026]),
)


@settings(max_examples=40)
@given(
    spending=st.lists(_SPENDING, max_size=7),
    part=st.sampled_from(["train", "held-out"]),
    split=st.sampled_from(["s", "t"]),
)
def test_what_is_spent_is_what_the_lines_say(
    tmp_path_factory: pytest.TempPathFactory, spending: list[Any], part: str, split: str
) -> None:
    folder = tmp_path_factory.mktemp("ledgers")
    for data, of, under, event, taken, year in sorted(spending, key=lambda entry: entry[-1]):
        book = ledger(folder, data, now=datetime(year, 6, 1, tzinfo=UTC))
        reserved = book.reserve(event, part=of, split=under)
        if taken is not None:
            book.settle(reserved, taken, "failed")
    book, found = ledger(folder), lines(folder)
    assert sorted(book.spent(part, split)) == sorted(naive(found, part, split))
    for year in (0, 2026):
        want = max(epsilon(naive(found, of, split, year), DELTA) for of in ("train", "held-out"))
        assert book.total(DELTA, split, year=year) == want


def test_the_relation_and_the_accountant_are_the_callers(folder: Path) -> None:
    written(folder)
    want = epsilon(EVENTS, DELTA, "replace_one", "rdp")
    assert ledger(folder).total(DELTA, "", neighbours="replace_one", accountant="rdp") == want > epsilon(EVENTS, DELTA)


# Limits


def test_more_than_the_limit_is_refused_and_nothing_is_written(folder: Path) -> None:
    limit = Limit(epsilon((EVENTS[0],), DELTA), DELTA, "the job's privacy.epsilon")
    ledger(folder).reserve(EVENTS[0], limits=[limit])  # exactly reached
    before = lines(folder)
    with pytest.raises(OverspentError) as refusal:
        ledger(folder).reserve(Event(5.0, 0.01, 1), limits=[limit])
    assert lines(folder) == before
    assert refusal.value.limit is limit
    assert "more than the job's privacy.epsilon, so nothing is trained" in str(refusal.value)
    with pytest.raises(OverspentError):
        ledger(folder).require_room(Event(5.0, 0.01, 1), limits=[limit])
    # Under another, later limit there is room.
    ledger(folder).require_room(Event(5.0, 0.01, 1), limits=[Limit(100, DELTA, "more")])


def test_every_limit_holds(folder: Path) -> None:
    wide, narrow = Limit(100, DELTA, "wide"), Limit(0.5, 1e-3, "narrow")
    for limits in ([wide, narrow], [narrow, wide]):
        with pytest.raises(OverspentError, match="more than narrow"):
            ledger(folder).reserve(EVENTS[0], limits=limits)
    ledger(folder).reserve(EVENTS[0], limits=[wide])


def test_an_epsilon_that_does_not_exist_is_within_no_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for beyond in (float("inf"), float("nan")):
        monkeypatch.setattr("fedgraft.privacy.ledger.epsilon", lambda *args, e=beyond: e)
        with pytest.raises(OverspentError):
            ledger(folder).reserve(EVENTS[0], limits=[Limit(8, DELTA, "the job")])
    assert lines(folder) == []


def test_a_limit_on_the_year_begins_anew_with_the_year_and_that_on_all_does_not(folder: Path) -> None:
    event = Event(1.0, 0.1, 6)
    year = Limit(1.2 * epsilon((event,), DELTA), DELTA, "the year", year=True)
    total = Limit(epsilon((event, event), DELTA), DELTA, "the policy")
    december, new_year = datetime(2026, 12, 31, 23, 59, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    ledger(folder, now=december).reserve(event, limits=[year, total])
    with pytest.raises(OverspentError, match=r"all runs of this year on these data .* more than the year"):
        ledger(folder, now=december).reserve(event, limits=[year, total])
    ledger(folder, now=new_year).reserve(event, limits=[year, total])
    with pytest.raises(OverspentError, match=r"all runs on these data .* more than the policy"):
        ledger(folder, now=new_year).reserve(event, limits=[total])


def test_the_year_is_that_of_universal_time(folder: Path) -> None:
    event = EVENTS[0]
    year = Limit(1.2 * epsilon((event,), DELTA), DELTA, "the year", year=True)
    ahead = datetime.fromisoformat("2027-01-01T05:00:00+09:00")  # 2026 in UTC
    ledger(folder, now=ahead - timedelta(hours=1)).reserve(event, limits=[year])
    with pytest.raises(OverspentError):
        ledger(folder, now=ahead).reserve(event, limits=[year])


def test_what_the_held_out_paid_limits_the_training_too(folder: Path) -> None:
    """Nobody may be told less than the most that anybody paid."""
    limit = Limit(1.0, DELTA, "the job")
    ledger(folder).reserve(EVENTS[2], part="held-out", split="s")
    assert epsilon(EVENTS[2:], DELTA) > 1
    small = Event(20.0, 0.01, 1)
    with pytest.raises(OverspentError):
        ledger(folder).reserve(small, part="train", split="s", limits=[limit])


def test_what_was_given_back_can_be_spent(folder: Path) -> None:
    limit = Limit(epsilon((EVENTS[0],), DELTA), DELTA, "the job")
    reserved = ledger(folder).reserve(EVENTS[0], limits=[limit])
    with pytest.raises(OverspentError):
        ledger(folder).reserve(EVENTS[0], limits=[limit])
    ledger(folder).settle(reserved, 0, "failed")
    ledger(folder).reserve(EVENTS[0], limits=[limit])


def test_processes_cannot_spend_one_budget_twice(folder: Path) -> None:
    """Four at once, on two states of the data, reach for a budget that holds five reservations."""
    event = Event(2.0, 0.1, 3)
    limit = Limit(epsilon((event,) * 5, DELTA), DELTA, "the policy")
    fork = multiprocessing.get_context("fork")
    epsilon((event,) * 6, DELTA)

    def spend(writer: int, granted: Any) -> None:
        book = Ledger(folder, (DATA, CHANGED)[writer % 2], dataset="letters")
        for number in range(4):
            try:
                book.reserve(event, limits=[limit], round=number)
            except OverspentError:
                continue
            granted.put(writer)

    granted = fork.SimpleQueue()
    processes = [fork.Process(target=spend, args=(writer, granted)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    count = 0
    while not granted.empty():
        granted.get()
        count += 1
    assert count == len(Ledger(folder).events()) == 5
    assert Ledger(folder).total(DELTA, "") <= limit.epsilon


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")

    def write(writer: int) -> None:
        for number in range(10):
            reserved = Ledger(folder, DATA).reserve(Event(1.0 + writer, 0.1, number + 2))
            Ledger(folder, DATA).settle(reserved, number + 1, "released")

    processes = [fork.Process(target=write, args=(writer,)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    events = Ledger(folder).events()
    for writer in range(3):
        assert [e.steps for e in events if e.noise_multiplier == 1.0 + writer] == list(range(1, 11))


# What it refuses


def test_two_units_do_not_share_a_ledger(folder: Path) -> None:
    ledger(folder, unit="record").reserve(EVENTS[0])
    assert ledger(folder, unit="record").events() == EVENTS[:1]
    other = ledger(folder, CHANGED, unit="patient")
    for use in (other.events, lambda: other.reserve(EVENTS[0]), lambda: other.total(DELTA, "")):
        with pytest.raises(UserError, match="line 1 protected each record, this run protects each patient") as refusal:
            use()
        assert str(refusal.value).startswith(f"{folder}/{DATA[:16]}.jsonl: ")
    assert ledger(folder).events() == EVENTS[:1]


def test_seeded_noise_in_the_past_is_remembered(folder: Path) -> None:
    assert ledger(folder).private_noise()
    ledger(folder).reserve(EVENTS[0], private_noise=False)
    ledger(folder, CHANGED).reserve(EVENTS[0])
    assert not ledger(folder, CHANGED).private_noise()


@pytest.mark.parametrize("kind", ["reserve", "settle"])
def test_a_clock_that_is_behind_the_ledger_is_refused(folder: Path, kind: str) -> None:
    """Else last year's clock would spend last year's budget again."""
    first, second = ledger(folder), ledger(folder, now=NOW + timedelta(hours=1))
    reserved = first.reserve(EVENTS[0])
    if kind == "reserve":
        second.reserve(EVENTS[0])
    else:
        second.settle(reserved, 3, "failed")
    before = lines(folder)
    for book in (first, ledger(folder, CHANGED)):
        for use in (book.reserve, book.require_room):
            with pytest.raises(
                UserError, match=r"line 2 was written at 2026-11-22T13:00.*this machine's clock is behind"
            ):
                use(EVENTS[0])
    assert lines(folder) == before
    # What was spent can still be told, and a clock that is merely put right by a moment is no clock that is behind.
    assert len(first.entries()) == (2 if kind == "reserve" else 1)
    ledger(folder, now=NOW + timedelta(minutes=59, seconds=30)).reserve(EVENTS[0])


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("data", [DATA, CHANGED])
def test_damage_in_any_file_stops_the_training(folder: Path, line: int, data: str) -> None:
    written(folder)
    file = folder / f"{DATA[:16]}.jsonl"
    content = file.read_bytes().splitlines(keepends=True)
    content[line] = content[line].replace(b'"steps": ', b'"steps": 1')
    file.write_bytes(b"".join(content))
    book = ledger(folder, data)
    for use in (book.events, lambda: book.reserve(EVENTS[0]), lambda: book.require_room(EVENTS[0]), lambda: book.head):
        with pytest.raises(UserError) as refusal:
            use()
        assert str(refusal.value) == (
            f"{file}: line {line + 1} was changed or lost; the budget spent is unknown, so nothing is trained: restore "
            "the file from a backup"
        )
    assert file.read_bytes() == b"".join(content)


def _settle(reserved: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "settle", "id": reserved, "time": NOW.isoformat(), "steps": 1, "outcome": "failed", **changes}


@pytest.mark.parametrize(
    "line",
    [
        lambda first: {},
        lambda first: {**first, "id": first["id"]},
        lambda first: {**first, "id": "x", "events": [{"noise_multiplier": 0.0, "sampling_rate": 1.0, "steps": 6}]},
        lambda first: {**first, "id": "x", "steps": 5},
        lambda first: {**first, "id": "x", "time": "yesterday"},
        lambda first: {**first, "id": "x", "time": "2026-01-01T00:00:00"},
        lambda first: {**first, "id": "x", "private_noise": 1},
        lambda first: {**first, "id": "x", "split": None},
        lambda first: _settle("unknown"),
        lambda first: _settle(first["id"], steps=7),
        lambda first: _settle(first["id"], steps=-1),
        lambda first: _settle(first["id"], outcome="lost"),
        lambda first: _settle(first["id"], kind="refund"),
        lambda first: _settle(first["id"], time="2026-01-01T00:00:00"),
        lambda first: _settle("unknown", kind="resume"),
        lambda first: _settle(first["id"], kind="resume", time="2026-01-01T00:00:00"),
    ],
)
def test_a_line_that_is_whole_but_no_entry_is_damage(folder: Path, line: Callable[..., dict[str, Any]]) -> None:
    ledger(folder).reserve(EVENTS[0])
    file = folder / f"{DATA[:16]}.jsonl"
    first = {key: value for key, value in lines(folder)[0].items() if key not in ("before", "sha256")}
    ledger_file(file).append(line(first))
    for use in (ledger(folder).events, lambda: ledger(folder, CHANGED).reserve(EVENTS[0])):
        with pytest.raises(UserError, match=f"^{file}: line 2 is no entry of a ledger; the budget spent is unknown"):
            use()


def test_a_settlement_in_another_file_is_damage(folder: Path) -> None:
    reserved = ledger(folder, CHANGED).reserve(EVENTS[0])
    ledger(folder, DATA).reserve(EVENTS[0])
    ledger_file(folder / f"{DATA[:16]}.jsonl").append(_settle(reserved.id))
    with pytest.raises(UserError, match="line 2 is no entry of a ledger"):
        ledger(folder).events()


def test_what_is_taken_up_again_in_another_file_or_after_its_settlement_is_damage(folder: Path) -> None:
    reserved = ledger(folder, CHANGED).reserve(EVENTS[0])
    ledger(folder, CHANGED).settle(reserved, 6, "released")
    file = folder / f"{CHANGED[:16]}.jsonl"
    content = file.read_bytes()
    for place, kept in ((folder / f"{DATA[:16]}.jsonl", content.splitlines(keepends=True)[0]), (file, content)):
        file.write_bytes(kept)
        ledger_file(place).append({"kind": "resume", "id": reserved.id, "time": NOW.isoformat()})
        with pytest.raises(UserError, match=r"line \d is no entry of a ledger"):
            ledger(folder).events()
        place.unlink()


def test_a_crash_in_the_settlement_counts_the_whole_reservation(folder: Path) -> None:
    book = ledger(folder)
    book.settle(book.reserve(EVENTS[0]), 2, "failed")
    assert book.path is not None
    content = book.path.read_bytes()
    start = content.index(b"\n") + 1
    for cut in range(start, len(content) + 1):
        book.path.write_bytes(content[:cut])
        want = (Event(1.0, 0.1, 2),) if cut >= len(content) - 1 else EVENTS[:1]
        assert book.events() == want, cut


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "ledgers", Path("/proc/fedgraft")):
        with pytest.raises(UserError) as refusal:
            ledger(folder).reserve(EVENTS[0])
        assert str(refusal.value).startswith(
            f"{folder}/{DATA[:16]}.jsonl: the ledger cannot be written, so nothing is "
        )
        assert "\n" not in str(refusal.value)


def test_a_ledger_that_has_answered_before_sees_what_others_wrote_and_what_was_changed_since(folder: Path) -> None:
    reader = ledger(folder)
    assert reader.events() == ()
    first = ledger(folder).reserve(EVENTS[0], split="s")
    assert reader.events() == EVENTS[:1] and reader.events() == EVENTS[:1]
    ledger(folder, CHANGED).reserve(EVENTS[1], split="s")
    assert reader.events() == EVENTS[:2]
    ledger(folder).settle(first, 0, "failed")
    assert reader.events() == ledger(folder).events() == EVENTS[1:2]
    file = folder / f"{CHANGED[:16]}.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"part": "train"', b'"part": "other"'))
    with pytest.raises(UserError, match="was changed or lost"):
        reader.events()


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder)

    def denied(*arguments: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for method in ("iterdir", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, denied)
            for use in (ledger(folder).events, lambda: ledger(folder).reserve(EVENTS[0])):
                with pytest.raises(UserError, match="the ledger cannot be read: Permission denied"):
                    use()


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_a_disk_that_fails_grants_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    written(folder)

    def fails(*arguments: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(
            UserError, match="the ledger cannot be written, so nothing is trained: No space left on dev"
        ):
            ledger(folder).reserve(EVENTS[0])
    monkeypatch.undo()
    assert ledger(folder).events()[: len(EVENTS)] == EVENTS
    ledger(folder).reserve(EVENTS[0])
    assert ledger(folder).events()[-1] == EVENTS[0]


def test_a_reservation_is_on_the_disk_before_it_is_granted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, []

    def confirm(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", confirm)
    reserved = ledger(folder).reserve(EVENTS[0])
    file = str(folder / f"{DATA[:16]}.jsonl")
    assert file in synced
    assert {str(folder), str(folder.parent), str(folder.parent.parent)} <= set(synced)
    synced.clear()
    ledger(folder).settle(reserved, 1, "failed")
    assert synced == [file]


# One file, at a server


def test_a_single_file_is_a_ledger_too(tmp_path: Path) -> None:
    place = tmp_path / "central-ledger.jsonl"
    Ledger(tmp_path / "other-ledger.jsonl", unit="record").reserve(EVENTS[1])
    reserved = Ledger(place, unit="site").reserve(EVENTS[0], round=1)
    assert Ledger(place, unit="site").events() == EVENTS[:1]
    Ledger(place).settle(reserved, 2, "released")
    assert Ledger(place).events() == (Event(1.0, 0.1, 2),)
