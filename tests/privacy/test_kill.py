"""Kill -9 at random moments: the ledger covers every released update and counts every event, and always verifies."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgraft.privacy.ledger import Ledger, Limit


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    """The module `benchmarks/kill.py`."""
    path = Path(__file__).parents[2] / "benchmarks" / "kill.py"
    spec = importlib.util.spec_from_file_location("kill", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module
    spec.loader.exec_module(module)
    return module


def test_a_killed_process_has_released_nothing_that_its_ledger_does_not_cover(kill: ModuleType, tmp_path: Path) -> None:
    found = kill.kill_loop(8, tmp_path, random.Random(1))
    assert found["kills"] == sum(found["found"].values()) == 8
    assert found["entries"] >= 8 and found["epsilon"] > 0


@pytest.mark.slow
def test_a_hundred_kills_find_nothing_wrong(kill: ModuleType, tmp_path: Path) -> None:
    found = kill.kill_loop(100, tmp_path, random.Random(2))
    assert found["kills"] == 100 and len(found["found"]) >= 3 and found["released"] > 50


@pytest.mark.slow
def test_a_federation_that_is_killed_and_resumed_spends_no_more_than_it_says(
    kill: ModuleType, tmp_path: Path, tiny_federation: Any
) -> None:
    changes = {"privacy.epsilon": 100.0, "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-5, "rounds": 10}
    config = tiny_federation.private(**{**changes, "evaluate.release": "noised"})
    found = kill.kill_federation(12, tmp_path, config, random.Random(3))
    assert found["kills"] == 12 and found["answers"] > 0 and found["finished"] == found["runs"]


def _written(kill: ModuleType, folder: Path) -> list[dict[str, Any]]:
    """Three reservations, two of them settled, and what was released of each."""
    ledger = Ledger(folder / "ledgers", kill.DATA, unit="record")
    reserved = [ledger.reserve(kill.EVENTS[0], split="s", limits=[Limit(99, 1e-5, "all")]) for _ in range(3)]
    ledger.settle(reserved[0], 6, "released")
    ledger.settle(reserved[1], 2, "failed")
    return [{"line": each.line} for each in (reserved[0], reserved[2])]


def test_what_the_kills_look_for_would_be_seen(
    kill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = _written(kill, tmp_path)
    seen = kill.require_right(tmp_path, released, 1e-5)
    assert (seen["entries"], seen["state"]) == (3, "released, not settled")
    with pytest.raises(kill.WrongError, match="an update was released that no line covers"):
        kill.require_right(tmp_path, [{"line": "f" * 64}], 1e-5)
    with monkeypatch.context() as patch:
        # A ledger that forgot what was reserved and not settled.
        forgetful = property(lambda entry: entry.events if entry.outcome else ())
        patch.setattr("fedgraft.privacy.ledger.Entry.counted", forgetful)
        with pytest.raises(kill.WrongError, match="the ledger counts other events than its lines say"):
            kill.require_right(tmp_path, released, 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "total", lambda *args, **more: 0.1)
        with pytest.raises(kill.WrongError, match=r"epsilon 0\.1 is not"):
            kill.require_right(tmp_path, released, 1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"steps": 2', '"steps": 1'),
        lambda text: "".join(text.splitlines(keepends=True)[1:]),
        lambda text: text.replace('"before": "', '"before": "0', 1),
    ],
)
def test_a_damaged_line_would_be_seen(kill: ModuleType, tmp_path: Path, damage: Callable[[str], str]) -> None:
    _written(kill, tmp_path)
    (file,) = (tmp_path / "ledgers").glob("*.jsonl")
    file.write_text(damage(file.read_text()))
    with pytest.raises(kill.WrongError, match="is damaged"):
        kill.chained(file)


def test_the_published_figures_are_of_a_hundred_kills(kill: ModuleType) -> None:
    found = json.loads(kill.RESULTS.read_text(encoding="utf-8"))
    assert found["kills"] == found["loop"]["kills"] + found["federation"]["kills"] >= 100
    assert found["wrong"] == 0 and found["federation"]["answers"] > 0
