"""What a site remembers of a run: by round, whole or not at all, and never more than a few rounds of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgraft.client.memory import SiteMemory
from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import UserError

SPEC = AdapterSpec("memory", (TensorSpec("own", (2,)),))


def _state(value: float) -> AdapterState:
    return AdapterState(SPEC, {"own": np.full(2, value, np.float32)})


@pytest.mark.parametrize("place", ["folder", "process"])
def test_a_round_finds_what_was_known_before_it(tmp_path: Path, place: str) -> None:
    memory = SiteMemory(tmp_path if place == "folder" else None, "run")
    assert memory.before(1) == {}
    for number in (1, 2, 4):
        memory.keep(number, {"head": _state(number)})
    if place == "folder":
        memory = SiteMemory(tmp_path, "run")
    assert memory.before(1) == {}
    assert memory.before(2)["head"] == _state(1)
    assert memory.before(4)["head"] == memory.of(3)["head"] == _state(2)
    assert memory.of(4)["head"] == memory.before(9)["head"] == _state(4)


def test_a_round_that_is_run_again_forgets_what_came_after(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "run")
    for number in (1, 2, 3):
        memory.keep(number, {"head": _state(number)})
    memory.keep(2, {"head": _state(20)})
    assert memory.of(5)["head"] == _state(20)
    memory.keep(2, {})
    assert memory.of(5)["head"] == _state(1)


def test_rounds_long_past_are_forgotten(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "run")
    for number in range(1, 40):
        memory.keep(number, {"head": _state(number)})
    kept = sorted(int(path.name) for path in tmp_path.glob("memory/*/*"))
    assert len(kept) <= 10 and kept[-1] == 39 and memory.before(39)["head"] == _state(38)


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    SiteMemory(tmp_path, "one").keep(1, {"head": _state(1)})
    assert SiteMemory(tmp_path, "other").of(9) == {}
    assert SiteMemory(tmp_path, "../../one").of(9) == {}


def test_nothing_to_remember_leaves_no_folder(tmp_path: Path) -> None:
    SiteMemory(tmp_path, "run").keep(1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("in the way")
    with pytest.raises(UserError, match="what the site must remember cannot be written"):
        SiteMemory(tmp_path, "run").keep(1, {"head": _state(1)})
