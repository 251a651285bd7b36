"""The state of a run after each round, so that a killed run goes on from its last whole checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.adapter import AdapterState
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from .files import write_folder, write_json

_MANIFEST = "checkpoint.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """``round`` completed rounds, the global ``state`` after them, and what the strategy remembers."""

    round: int
    state: AdapterState
    memory: Mapping[str, AdapterState] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, config_digest: str, keep: int) -> None:
    """Write ``folder/round-NNNN`` whole or not at all, then remove all but the last ``keep``.

    Raises :class:`UserError` when the disk is full or read-only; earlier checkpoints stay as they are.
    """

    def fill(beside: Path) -> None:
        parts = {"adapter": checkpoint.state, **{f"memory-{k}": v for k, v in checkpoint.memory.items()}}
        sums = {}
        for name, state in parts.items():
            path = beside / f"{name}.safetensors"
            state.save(path)
            sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(
            beside / _MANIFEST,
            {"schema": _SCHEMA, "round": checkpoint.round, "config_digest": config_digest, "files": sums},
        )

    write_folder(folder / _name(checkpoint.round), fill)
    for old in _by_round(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_last(folder: Path, watch: Watch = SILENT) -> Checkpoint:
    """The last whole checkpoint in ``folder``; broken ones are passed over and named.

    Raises :class:`UserError` when there is none.
    """
    found = _by_round(folder)
    for path in reversed(found):
        try:
            return _load(path)
        except UserError as error:
            watch.note(f"{error}; falling back to the checkpoint before it")
    if found:
        raise UserError(f"{folder}: none of the {len(found)} checkpoints is whole; start the run again")
    raise UserError(f"{folder}: there is no checkpoint to resume from")


def _name(round: int) -> str:
    return f"round-{round:04d}"


def _by_round(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"), key=lambda path: (len(path.name), path.name))


def _load(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        schema, number, sums = manifest["schema"], int(manifest["round"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: the checkpoint is corrupt (no readable {_MANIFEST})") from None
    if schema != _SCHEMA:
        raise UserError(f"{path}: checkpoint schema {schema}, this version reads {_SCHEMA}")
    if path.name != _name(number):
        raise UserError(f"{path}: the checkpoint is corrupt ({_MANIFEST} says that it is of round {number})")
    states = {}
    for name, expected in sums.items():
        try:
            content = (path / name).read_bytes()
        except OSError:
            raise UserError(f"{path}: the checkpoint is corrupt ({name} is missing)") from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise UserError(f"{path}: the checkpoint is corrupt ({name} does not match its checksum)")
        states[name.removesuffix(".safetensors")] = AdapterState.load(path / name)
    if "adapter" not in states:
        raise UserError(f"{path}: the checkpoint is corrupt (it lists no adapter)")
    memory = {k.removeprefix("memory-"): v for k, v in states.items() if k != "adapter"}
    return Checkpoint(number, states["adapter"], memory)
