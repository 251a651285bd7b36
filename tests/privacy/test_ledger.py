"""The ledger loses nothing: not to a crash in a write, not to two writers, not to a careless edit."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.ledger import Ledger

EVENTS = (Event(1.0, 0.1, 6), Event(1.0 / 3.0, 100 / 1234, 5), Event(1.5, 1.0, 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "deep" / "ledger.jsonl"


def _written(path: Path) -> bytes:
    ledger = Ledger(path)
    for number, event in enumerate(EVENTS):
        ledger.reserve(event, run="run-1", round=number)
    return path.read_bytes()


@pytest.mark.parametrize("in_memory", [True, False])
def test_events_come_back_exactly_and_in_order(path: Path, in_memory: bool) -> None:
    ledger = Ledger(None if in_memory else path)
    assert ledger.events() == ()
    for number, event in enumerate(EVENTS, 1):
        assert ledger.reserve(event, run="run-1", round=number) == EVENTS[:number]
        assert ledger.events() == EVENTS[:number]
    assert path.exists() != in_memory


def test_another_process_reads_what_the_first_wrote(path: Path) -> None:
    _written(path)
    assert Ledger(path).events() == EVENTS
    assert Ledger(str(path)).reserve(EVENTS[0])[:3] == EVENTS


def test_events_of_several_runs_compose(path: Path) -> None:
    _written(path)
    assert epsilon(Ledger(path).events(), 1e-5) == epsilon(EVENTS, 1e-5) > epsilon(EVENTS[:1], 1e-5)


def test_an_entry_says_what_it_was_spent_on(path: Path) -> None:
    _written(path)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["run"], entry["round"]) for entry in entries] == [("run-1", 0), ("run-1", 1), ("run-1", 2)]


@pytest.mark.parametrize("word", ["noise_multiplier", "sampling_rate", "steps", "unit", "before", "sha256"])
def test_what_it_was_spent_on_cannot_change_what_was_spent(path: Path, word: str) -> None:
    about: dict[str, Any] = {word: 1}
    with pytest.raises(ValueError, match=word):
        Ledger(path).reserve(EVENTS[0], **about)


def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    _written(path)
    assert path.stat().st_mode & 0o077 == 0


def test_a_crash_at_any_byte_of_a_write_loses_nothing_that_was_trained(path: Path) -> None:
    """Cut the last line at every byte: earlier events stand, the cut one counts from its last byte on."""
    content = _written(path)
    start = content.rfind(b"\n", 0, len(content) - 1) + 1
    for cut in range(start, len(content) + 1):
        path.write_bytes(content[:cut])
        # Once every byte of the entry is there it counts, with or without its line end.
        whole = EVENTS if cut >= len(content) - 1 else EVENTS[:2]
        assert Ledger(path).events() == whole, cut
        assert Ledger(path).reserve(EVENTS[1]) == (*whole, EVENTS[1]), cut
        assert Ledger(path).events() == (*whole, EVENTS[1]), cut
        assert path.read_bytes().count(b"\n") == len(whole) + 1, cut


def test_a_longer_line_that_was_cut_leaves_no_rest_behind_a_shorter_one(path: Path) -> None:
    content = _written(path)
    Ledger(path).reserve(EVENTS[0], run="a" * 500)
    path.write_bytes(path.read_bytes()[:-2])
    assert Ledger(path).reserve(EVENTS[0], run="b") == (*EVENTS, EVENTS[0])
    assert path.read_bytes().startswith(content)
    assert path.read_bytes().count(b"\n") == 4 and path.read_bytes().endswith(b"\n")


def test_a_crash_in_the_first_write_leaves_an_empty_ledger(path: Path) -> None:
    content = _written(path)
    for cut in range(0, content.index(b"\n"), 5):
        path.write_bytes(content[:cut])
        assert Ledger(path).events() == ()
        assert Ledger(path).reserve(EVENTS[0]) == EVENTS[:1]


def test_a_write_that_the_disk_takes_in_pieces_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:7])))
    assert Ledger(path).reserve(EVENTS[0]) == EVENTS[:1]
    assert Ledger(path).reserve(EVENTS[1]) == EVENTS[:2]
    assert Ledger(path).events() == EVENTS[:2]


def test_a_full_disk_is_an_error_and_what_was_written_of_the_line_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _written(path)
    write, calls = os.write, []

    def full(file: int, data: Any) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(file, bytes(data[:20]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="cannot be written, so nothing is trained: No space left on device"):
            Ledger(path).reserve(EVENTS[0])
    assert Ledger(path).events() == EVENTS
    assert Ledger(path).reserve(EVENTS[0]) == (*EVENTS, EVENTS[0])


def test_an_entry_is_on_the_disk_before_it_is_granted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file after its last byte, then the folders that were made for it."""
    write, fsync, done = os.write, os.fsync, []

    def place(file: int) -> str:
        return str(Path(f"/proc/self/fd/{file}").readlink())

    monkeypatch.setattr(os, "write", lambda file, data: done.append(("write", place(file))) or write(file, data))
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("sync", place(file))) or fsync(file))
    Ledger(path).reserve(EVENTS[0])
    assert done[:2] == [("write", str(path)), ("sync", str(path))]
    assert {where for what, where in done[2:] if what == "sync"} == {str(folder) for folder in list(path.parents)[:3]}
    done.clear()
    Ledger(path).reserve(EVENTS[0])
    assert done == [("write", str(path)), ("sync", str(path))]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_disk_that_does_not_confirm_grants_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    fsync, calls = os.fsync, []

    def broken(file: int) -> None:
        calls.append(file)
        if len(calls) > fails:
            raise OSError(5, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match="cannot be written, so nothing is trained: Input/output error"):
        Ledger(path).reserve(EVENTS[0])


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize(
    ("old", "new"), [(b'"steps": ', b'"steps": 1'), (b'"round": ', b'"round": 7'), (b'"before": "', b'"before": "f')]
)
def test_a_changed_line_is_refused_wherever_it_is(path: Path, line: int, old: bytes, new: bytes) -> None:
    lines = _written(path).splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new)
    path.write_bytes(b"".join(lines))
    for use in (lambda: Ledger(path).events(), lambda: Ledger(path).reserve(EVENTS[0])):
        with pytest.raises(UserError) as refusal:
            use()
        assert f"{path}: line {line + 1} was changed or lost" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_any_flipped_byte_is_found(path: Path) -> None:
    content = _written(path)
    # The very last byte is the line end, whose loss the entry survives.
    for at in range(0, len(content) - 1, 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="was changed or lost"):
            Ledger(path).events()


@pytest.mark.parametrize("keep", [[1, 2], [0, 2], [0, 2, 1], [0, 0, 1, 2], [0, 1, 2, 2]])
def test_a_lost_repeated_or_moved_line_is_refused(path: Path, keep: list[int]) -> None:
    lines = _written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in keep))
    with pytest.raises(UserError, match="was changed or lost"):
        Ledger(path).events()


@pytest.mark.parametrize("garbage", [b"\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b"not json\n"])
def test_a_file_that_is_not_a_ledger_is_refused(path: Path, garbage: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(garbage)
    with pytest.raises(UserError, match="line 1 was changed or lost"):
        Ledger(path).reserve(EVENTS[0])
    assert path.read_bytes() == garbage


def test_two_units_do_not_share_a_ledger(path: Path) -> None:
    Ledger(path, unit="record").reserve(EVENTS[0])
    assert Ledger(path, unit="record").events() == EVENTS[:1]
    for use in (
        lambda: Ledger(path, unit="patient").events(),
        lambda: Ledger(path, unit="patient").reserve(EVENTS[0]),
    ):
        with pytest.raises(UserError, match="line 1 protected each record, this run protects each patient"):
            use()
    assert Ledger(path).events() == EVENTS[:1]


@pytest.mark.parametrize("writers", [2, 4])
def test_processes_that_write_at_once_lose_nothing(path: Path, writers: int) -> None:
    each = 15
    fork = multiprocessing.get_context("fork")

    def write(writer: int) -> None:
        for number in range(each):
            Ledger(path).reserve(Event(1.0 + writer, 0.1, number + 1))

    processes = [fork.Process(target=write, args=(writer,)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * writers
    events = Ledger(path).events()
    for writer in range(writers):
        assert [e.steps for e in events if e.noise_multiplier == 1.0 + writer] == list(range(1, each + 1))
    assert len(events) == writers * each


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file / "ledger.jsonl", tmp_path, Path("/proc/fedgraft/ledger.jsonl")):
        with pytest.raises(UserError) as refusal:
            Ledger(path).reserve(EVENTS[0])
        assert str(refusal.value).startswith(f"{path}: the ledger cannot be written, so nothing is trained: ")
        assert "\n" not in str(refusal.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="the ledger cannot be written, so nothing is trained: Permission denied"):
        Ledger(tmp_path / "ledger.jsonl").reserve(EVENTS[0])


def test_a_refused_permission_is_one_clear_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _written(path)

    def denied(*arguments: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError, match="cannot be written, so nothing is trained: Permission denied"):
        Ledger(path).reserve(EVENTS[0])
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        Ledger(path).events()
