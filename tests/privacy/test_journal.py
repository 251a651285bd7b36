"""What the ledger and the audit log are written in loses nothing: not to a crash in a write, not to two writers, not to
a careless edit."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.privacy.journal import CHAIN, DamagedError, Journal

ENTRIES: tuple[dict[str, Any], ...] = ({"n": 1.0 / 3.0, "who": "a"}, {"n": 2, "who": "b — ü\n"}, {"n": [3], "who": {}})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "deep" / "log.jsonl"


def journal(path: Path) -> Journal:
    return Journal(path, name="log", stop="nothing is done", damage="all is unknown")


def written(path: Path) -> bytes:
    for entry in ENTRIES:
        journal(path).append(entry)
    return path.read_bytes()


def entries(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple({key: e[key] for key in e if key not in CHAIN} for e in journal(path).entries())


def test_entries_come_back_exactly_and_in_order(path: Path) -> None:
    assert entries(path) == ()
    for number, entry in enumerate(ENTRIES, 1):
        last = journal(path).append(entry)
        assert entries(path) == ENTRIES[:number]
        assert journal(path).entries()[-1] == last
        assert last["sha256"] in path.read_text()


def test_each_line_is_one_line_of_json_that_carries_the_hash_of_the_line_before(path: Path) -> None:
    lines = [json.loads(line) for line in written(path).splitlines()]
    assert [line["before"] for line in lines] == ["0" * 64, *(line["sha256"] for line in lines[:-1])]


def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    written(path)
    assert path.stat().st_mode & 0o077 == 0


def test_a_number_that_is_none_is_not_written(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        journal(path).append({"n": float("nan")})
    assert entries(path) == ()


def test_a_crash_at_any_byte_of_a_write_loses_nothing_that_was_granted(path: Path) -> None:
    """Cut the last line at every byte: earlier entries stand, the cut one counts from its last byte on."""
    content = written(path)
    start = content.rfind(b"\n", 0, len(content) - 1) + 1
    for cut in range(start, len(content) + 1):
        path.write_bytes(content[:cut])
        # Once every byte of the entry is there it counts, with or without its line end.
        whole = ENTRIES if cut >= len(content) - 1 else ENTRIES[:2]
        assert entries(path) == whole, cut
        journal(path).append(ENTRIES[1])
        assert entries(path) == (*whole, ENTRIES[1]), cut
        assert path.read_bytes().count(b"\n") == len(whole) + 1, cut


def test_a_longer_line_that_was_cut_leaves_no_rest_behind_a_shorter_one(path: Path) -> None:
    content = written(path)
    journal(path).append({"who": "a" * 500})
    path.write_bytes(path.read_bytes()[:-2])
    journal(path).append({"who": "b"})
    assert entries(path) == (*ENTRIES, {"who": "b"})
    assert path.read_bytes().startswith(content)
    assert path.read_bytes().count(b"\n") == 4 and path.read_bytes().endswith(b"\n")


def test_a_crash_in_the_first_write_leaves_an_empty_file(path: Path) -> None:
    content = written(path)
    for cut in range(0, content.index(b"\n"), 5):
        path.write_bytes(content[:cut])
        assert entries(path) == ()
        journal(path).append(ENTRIES[0])
        assert entries(path) == ENTRIES[:1]


@pytest.mark.parametrize("size", [10, 60_000, 70_000, 300_000])
def test_lines_of_any_length_are_followed(path: Path, size: int) -> None:
    """The end of the file is read in blocks, which such lines are shorter or longer than."""
    wanted = []
    for letter in "abc":
        wanted.append({"who": letter * size})
        journal(path).append(wanted[-1])
        journal(path).append({})
        wanted.append({})
    assert list(entries(path)) == wanted
    path.write_bytes(path.read_bytes()[:-1] + b"x\n")
    with pytest.raises(DamagedError, match="line 6 was changed"):
        journal(path).append({})


def test_a_write_that_the_disk_takes_in_pieces_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:7])))
    written(path)
    assert entries(path) == ENTRIES


def test_a_full_disk_is_an_error_and_what_was_written_of_the_line_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path)
    write, calls = os.write, []

    def full(file: int, data: Any) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(file, bytes(data[:20]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="the log cannot be written, so nothing is done: No space left on device"):
            journal(path).append(ENTRIES[0])
    assert entries(path) == ENTRIES
    journal(path).append(ENTRIES[0])
    assert entries(path) == (*ENTRIES, ENTRIES[0])


def test_a_line_is_on_the_disk_before_it_is_granted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file after its last byte, then the folders that were made for it."""
    write, fsync, done = os.write, os.fsync, []

    def place(file: int) -> str:
        return str(Path(f"/proc/self/fd/{file}").readlink())

    monkeypatch.setattr(os, "write", lambda file, data: done.append(("write", place(file))) or write(file, data))
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("sync", place(file))) or fsync(file))
    journal(path).append(ENTRIES[0])
    assert done[:2] == [("write", str(path)), ("sync", str(path))]
    assert {where for what, where in done[2:] if what == "sync"} == {str(folder) for folder in list(path.parents)[:3]}
    done.clear()
    journal(path).append(ENTRIES[0])
    assert done == [("write", str(path)), ("sync", str(path))]


def test_a_journal_that_need_not_last_writes_the_same_lines_and_waits_for_no_disk(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lasting(file: int) -> None:
        raise OSError(5, "nobody asked for this")

    lines = written(path)
    monkeypatch.setattr(os, "fsync", lasting)
    brief = Journal(tmp_path / "brief" / "log.jsonl", name="log", stop="", damage="", durable=False)
    for entry in ENTRIES:
        brief.append(entry)
    assert brief.path.read_bytes() == lines and entries(brief.path) == ENTRIES
    with brief.path.open("ab") as file:
        file.write(b'{"torn')
    brief.append({"n": 4})
    assert entries(brief.path) == (*ENTRIES, {"n": 4})


def test_a_line_longer_than_a_block_is_found_from_the_end(path: Path) -> None:
    long = {"text": "x" * 50_000}
    for _ in range(3):
        journal(path).append(long)
        journal(path).append({"n": 1})
    assert entries(path) == (long, {"n": 1}) * 3


@pytest.mark.parametrize("fails", [0, 1])
def test_a_disk_that_does_not_confirm_grants_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    fsync, calls = os.fsync, []

    def broken(file: int) -> None:
        calls.append(file)
        if len(calls) > fails:
            raise OSError(5, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match="cannot be written, so nothing is done: Input/output error"):
        journal(path).append(ENTRIES[0])


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize(
    ("old", "new"), [(b'"n": ', b'"n": 1'), (b'"who": ', b'"whom": '), (b'"before": "', b'"before": "f')]
)
def test_a_changed_line_is_refused_wherever_it_is(path: Path, line: int, old: bytes, new: bytes) -> None:
    lines = written(path).splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new)
    path.write_bytes(b"".join(lines))
    with pytest.raises(DamagedError) as refusal:
        journal(path).entries()
    assert str(refusal.value) == f"{path}: line {line + 1} was changed or lost; all is unknown"
    assert (refusal.value.path, refusal.value.line) == (path, line + 1)
    if line == 2:
        # The next line would hang on it.
        with pytest.raises(DamagedError, match="line 3 was changed or lost"):
            journal(path).append(ENTRIES[0])


def test_any_flipped_byte_is_found(path: Path) -> None:
    content = written(path)
    # The very last byte is the line end, whose loss the entry survives.
    for at in range(0, len(content) - 1, 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="was changed or lost"):
            journal(path).entries()


@pytest.mark.parametrize("keep", [[1, 2], [0, 2], [0, 2, 1], [0, 0, 1, 2], [0, 1, 2, 2]])
def test_a_lost_repeated_or_moved_line_is_refused(path: Path, keep: list[int]) -> None:
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in keep))
    with pytest.raises(UserError, match="was changed or lost"):
        journal(path).entries()


@pytest.mark.parametrize(
    "garbage", [b"\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b"not json\n", b"[" * 9999 + b"\n"]
)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(path: Path, garbage: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(garbage)
    for use in (journal(path).entries, lambda: journal(path).append(ENTRIES[0])):
        with pytest.raises(UserError, match="line 1 was changed or lost"):
            use()
    assert path.read_bytes() == garbage


def test_a_line_that_was_checked_once_is_checked_again_when_it_has_changed(path: Path) -> None:
    """One object reads the file again and again, and remembers what it has seen."""
    reader = journal(path)
    for number, entry in enumerate(ENTRIES, 1):
        journal(path).append(entry)
        assert [each["n"] for each in reader.entries()] == [each["n"] for each in ENTRIES[:number]]
    content = path.read_bytes()
    for damaged, line in (
        (content.replace(b'"n": 2', b'"n": 3'), 2),
        (content[content.index(b"\n") + 1 :], 1),
        (content + content[: content.index(b"\n") + 1], 4),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=f"line {line} was changed or lost"):
            reader.entries()
        path.write_bytes(content)
        assert len(reader.entries()) == 3
    path.write_bytes(content[:-5])  # as a crash would leave it
    assert len(reader.entries()) == 2
    reader.append(ENTRIES[0])
    assert [each["n"] for each in reader.entries()] == [ENTRIES[0]["n"], 2, ENTRIES[0]["n"]]
    path.unlink()
    assert reader.entries() == []


@pytest.mark.parametrize("writers", [2, 4])
def test_processes_that_write_at_once_lose_nothing(path: Path, writers: int) -> None:
    each = 15
    fork = multiprocessing.get_context("fork")

    def write(writer: int) -> None:
        for number in range(each):
            journal(path).append({"writer": writer, "number": number})

    processes = [fork.Process(target=write, args=(writer,)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * writers
    found = entries(path)
    for writer in range(writers):
        assert [e["number"] for e in found if e["writer"] == writer] == list(range(each))
    assert len(found) == writers * each


def test_a_place_that_cannot_be_written_or_read_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file / "log.jsonl", tmp_path, Path("/proc/fedgraft/log.jsonl")):
        with pytest.raises(UserError) as refusal:
            journal(path).append(ENTRIES[0])
        assert str(refusal.value).startswith(f"{path}: the log cannot be written, so nothing is done: ")
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="the log cannot be read: Is a directory"):
        journal(tmp_path).entries()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="the log cannot be written, so nothing is done: Permission denied"):
        journal(tmp_path / "log.jsonl").append(ENTRIES[0])


def test_a_refused_permission_is_one_clear_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path)

    def denied(*arguments: Any, **more: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match="cannot be written, so nothing is done: Permission denied"):
        journal(path).append(ENTRIES[0])
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        journal(path).entries()


@pytest.mark.parametrize("key", CHAIN)
def test_an_entry_cannot_carry_what_the_journal_adds(path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"cannot hold `{key}`"):
        journal(path).append({"event": "x", key: "y"})
    journal(path).append({"event": "x", "inside": {key: "y"}})
    assert entries(path) == ({"event": "x", "inside": {key: "y"}},)
