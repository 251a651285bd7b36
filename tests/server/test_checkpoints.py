"""Checkpoints: whole or not there, and the last whole one is found."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.progress import Watch
from fedgraft.server import checkpoints, files
from fedgraft.server.checkpoints import Checkpoint, load_last, save

SPEC = AdapterSpec("lora", (TensorSpec("a", (2, 3)), TensorSpec("b", (3, 2), policy="freeze")))


def state(fill: float) -> AdapterState:
    return AdapterState(SPEC, {t.name: np.full(t.shape, fill, np.float32) for t in SPEC.tensors})


def write(folder: Path, *rounds: int, keep: int = 10) -> None:
    for number in rounds:
        save(folder, Checkpoint(number, state(number), {"momentum": state(-number)}), "digest", keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Notes(Watch):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    write(folder, 0, 1)
    notes = Notes()
    found = load_last(folder, notes)
    assert found.round == 1
    assert found.state == state(1)
    assert found.state.spec == SPEC
    assert dict(found.memory) == {"momentum": state(-1)}
    assert notes.texts == []


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["round-0002", "round-0003"]
    write(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["round-0004"]


def test_the_last_of_more_than_ten_thousand_rounds_is_the_last(tmp_path: Path) -> None:
    write(tmp_path, 9998, 9999, 10000, 10001, keep=2)
    assert names(tmp_path) == ["round-10000", "round-10001"]
    write(tmp_path, 9999)
    assert load_last(tmp_path).round == 10001


def test_a_round_that_is_run_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    save(tmp_path, Checkpoint(2, state(7)), "digest", 10)
    found = load_last(tmp_path)
    assert (found.round, found.state, dict(found.memory)) == (2, state(7), {})


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / ".round-0002.new"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    assert load_last(tmp_path).round == 1
    write(tmp_path, 2)
    assert load_last(tmp_path).round == 2
    assert names(tmp_path) == ["round-0001", "round-0002"]


def _full(*args: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_by_safetensors(*args: Any, **more: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ((AdapterState, "save"), _full),
        ((AdapterState, "save"), _full_by_safetensors),
        ((checkpoints, "write_json"), _full),
        ((files, "sync_file"), _full),
        ((Path, "rename"), _full),
        ((Path, "mkdir"), _full),
    ],
    ids=["tensors", "tensors by safetensors", "manifest", "flush", "rename", "folder"],
)
def test_a_full_disk_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], failure: Callable[..., None]
) -> None:
    write(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(*where, failure)
        with pytest.raises(UserError) as caught:
            save(tmp_path, Checkpoint(3, state(3)), "digest", keep=1)
    text = str(caught.value)
    assert str(tmp_path / "round-0003") in text
    assert "No space left on device" in text
    assert text.endswith("free the disk or choose another --output")
    assert names(tmp_path) == ["round-0001", "round-0002"]
    assert load_last(tmp_path).state == state(2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "checkpoint.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (
        lambda f: _flip(f / "adapter.safetensors"),
        "the checkpoint is corrupt (adapter.safetensors does not match its checksum)",
    ),
    "flipped byte in the memory": (
        lambda f: _flip(f / "memory-momentum.safetensors"),
        "the checkpoint is corrupt (memory-momentum.safetensors does not match its checksum)",
    ),
    "cut off": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:40]),
        "the checkpoint is corrupt (adapter.safetensors does not match its checksum)",
    ),
    "emptied": (
        lambda f: (f / "adapter.safetensors").write_bytes(b""),
        "the checkpoint is corrupt (adapter.safetensors does not match its checksum)",
    ),
    "a file is gone": (
        lambda f: (f / "memory-momentum.safetensors").unlink(),
        "the checkpoint is corrupt (memory-momentum.safetensors is missing)",
    ),
    "manifest is gone": (
        lambda f: (f / "checkpoint.json").unlink(),
        "the checkpoint is corrupt (no readable checkpoint.json)",
    ),
    "manifest is cut off": (
        lambda f: (f / "checkpoint.json").write_text('{"schema": 1,'),
        "the checkpoint is corrupt (no readable checkpoint.json)",
    ),
    "manifest is a list": (
        lambda f: (f / "checkpoint.json").write_text("[1]"),
        "the checkpoint is corrupt (no readable checkpoint.json)",
    ),
    "manifest of another round": (
        _manifest(lambda values: values.update(round=2)),
        "the checkpoint is corrupt (checkpoint.json says that it is of round 2)",
    ),
    "manifest without the adapter": (
        _manifest(lambda values: values["files"].pop("adapter.safetensors")),
        "the checkpoint is corrupt (it lists no adapter)",
    ),
    "another schema": (
        _manifest(lambda values: values.update(schema=9)),
        "checkpoint schema 9, this version reads 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    write(tmp_path, 1, 2, 3)
    damage(tmp_path / "round-0003")
    notes = Notes()
    assert load_last(tmp_path, notes).round == 2
    assert notes.texts == [f"{tmp_path}/round-0003: {reason}; falling back to the checkpoint before it"]


def test_a_file_with_a_forged_checksum_is_still_no_adapter(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path, 1, 2)
    path = tmp_path / "round-0002" / "adapter.safetensors"
    path.write_bytes(b"not tensors")
    _manifest(lambda v: v["files"].update({path.name: hashlib.sha256(b"not tensors").hexdigest()}))(path.parent)
    notes = Notes()
    assert load_last(tmp_path, notes).round == 1
    assert "not a whole safetensors file" in notes.texts[0]


def test_without_a_whole_checkpoint_there_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for number in (1, 2):
        _flip(tmp_path / f"round-000{number}" / "adapter.safetensors")
    with pytest.raises(UserError) as caught:
        load_last(tmp_path)
    assert str(caught.value) == f"{tmp_path}: none of the 2 checkpoints is whole; start the run again"


@pytest.mark.parametrize("exists", [True, False])
def test_without_any_checkpoint_there_is_one_line(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        folder.mkdir()
    with pytest.raises(UserError) as caught:
        load_last(folder)
    assert str(caught.value) == f"{folder}: there is no checkpoint to resume from"
