"""The run directory: who may have it, what is refused, and that its files are whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.server.files import write_folder, write_json, write_text
from fedgraft.server.rundir import RunDirectory, read_metrics, read_run

CONFIG = parse_config({"model": "m", "data": {"path": "d.csv", "sites": ["a"]}})
RUN: dict[str, Any] = {
    "run": "r",
    "config": CONFIG.model_dump(mode="json"),
    "status": "running",
    "started": "2026-11-22T18:02:11+00:00",
    "resumed": [],
    "model": {},
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was begun and is not running."""
    with RunDirectory.create(tmp_path / "run") as rundir:
        rundir.write_run(RUN)
    return tmp_path / "run"


def test_a_new_run_makes_its_folder_and_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with RunDirectory.create(folder) as rundir:
        rundir.write_run(RUN)
        assert rundir.read_run() == {"schema": 1, **RUN}
        assert rundir.config() == CONFIG
        assert (rundir.adapter, rundir.checkpoints) == (folder / "adapter", folder / "checkpoints")
        assert rundir.site("north") == folder / "sites" / "north"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]


def test_a_folder_with_other_things_in_it_may_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory.create(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_is_not_begun_over_another(begun: Path) -> None:
    before = (begun / "run.json").read_bytes()
    with pytest.raises(UserError) as caught:
        RunDirectory.create(begun)
    assert str(caught.value) == f"{begun}: already holds a run; choose another --output, or --resume it"
    assert (begun / "run.json").read_bytes() == before


@pytest.mark.parametrize("again", [RunDirectory.open, RunDirectory.create])
def test_a_running_run_is_left_alone(tmp_path: Path, again: Any) -> None:
    with RunDirectory.create(tmp_path) as rundir:
        if again == RunDirectory.open:
            rundir.write_run(RUN)
        with pytest.raises(UserError) as caught:
            again(tmp_path)
        assert str(caught.value) == f"{tmp_path}: another process is running this run"
    with again(tmp_path):
        pass


def test_nothing_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not-there"):
        for read in (RunDirectory.open, read_run):
            with pytest.raises(UserError) as caught:
                read(folder)
            assert str(caught.value) == f"{folder}: holds no run (no run.json)"
    assert not (tmp_path / "not-there").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[]", "schema None, this version reads 1"),
        (b"{}", "schema None, this version reads 1"),
        (b'{"schema": 2}', "schema 2, this version reads 1"),
        (b'{"schema": 1, "run": "r"}', "has no `config`; it was changed, or is not one of fedgraft's"),
    ],
)
def test_a_run_record_that_is_none_is_refused(begun: Path, content: bytes, reason: str) -> None:
    (begun / "run.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_run(begun)
    assert str(caught.value) == f"{begun}/run.json: {reason}"


def test_a_changed_configuration_in_the_run_record_is_refused(begun: Path) -> None:
    values = json.loads((begun / "run.json").read_text())
    values["config"]["train"]["lr"] = "fast"
    (begun / "run.json").write_text(json.dumps(values))
    with RunDirectory.open(begun) as rundir, pytest.raises(UserError, match=r"run\.json: `train\.lr`"):
        rundir.config()


@pytest.mark.parametrize("folder", ["/proc/fedgraft", "/dev/null/run", "/proc"])
def test_a_place_that_cannot_be_written_is_named(folder: str) -> None:
    with pytest.raises(UserError) as caught:
        RunDirectory.create(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: cannot be written: ")
    assert text.endswith("free the disk or choose another --output")


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: cannot be written: File exists"):
        RunDirectory.create(tmp_path / "file")


def test_metrics_are_appended_and_a_torn_line_is_left_out(begun: Path) -> None:
    with RunDirectory.open(begun) as rundir:
        assert rundir.read_metrics() == []
        for number in range(4):
            rundir.append_metrics({"round": number, "kind": "train"})
        path = begun / "metrics.jsonl"
        path.write_bytes(path.read_bytes() + b'{"round": 4, "ki')
        assert [line["round"] for line in rundir.read_metrics()] == [0, 1, 2, 3]
        rundir.forget_metrics_after(2)
        assert [line["round"] for line in rundir.read_metrics()] == [0, 1, 2]
        rundir.append_metrics({"round": 3, "kind": "train"})
    assert [line["round"] for line in read_metrics(begun)] == [0, 1, 2, 3]


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError) as caught:
            write_json(path, {"a": 2})
        with pytest.raises(UserError):
            RunDirectory(tmp_path).append_metrics({"round": 1})
    assert str(caught.value) == (
        f"{path}: cannot be written: No space left on device; free the disk or choose another --output"
    )
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_text_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "one")
    write_text(path, "zwei, größer")
    assert path.read_text(encoding="utf-8") == "zwei, größer"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    write_folder(path, lambda folder: (folder / "one").write_text("1"))

    def half(folder: Path) -> None:
        (folder / "two").write_text("2")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="adapter: cannot be written: No space left on device"):
        write_folder(path, half)

    def mistaken(folder: Path) -> None:
        (folder / "two").write_text("2")
        raise UserError("the state is not the whole adapter")

    with pytest.raises(UserError, match=r"^the state is not the whole adapter$"):
        write_folder(path, mistaken)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert [p.name for p in path.iterdir()] == ["one"]

    def nested(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "three").write_text("3")

    write_folder(path, nested)
    assert [str(p.relative_to(path)) for p in sorted(path.rglob("*"))] == ["inner", "inner/three"]
