"""Runs that are killed, damaged or extended, and what becomes of them when they are resumed."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy import Ledger, epsilon
from fedgraft.server.rundir import RunDirectory
from fedgraft.strategies import aggregator, averaging

#: A run in a process of its own that kills itself, as the kernel would, once it has come to AT.
CHILD = """
import os, signal, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from fedgraft.core.config import config_from_json
from fedgraft.core.progress import Watch
from fedgraft.server import checkpoints, rounds
from fedgraft.simulations import run as runs

def reached(*at):
    if at == AT:
        Path(MARK).touch()
        while WAIT:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)

class Watching(Watch):
    def phase_started(self, kind, round, sites):
        self.kind, self.round = kind, round
    def site_step(self, site, step, steps, loss, epsilon):
        reached("step", self.kind, self.round, site, step)
    def site_finished(self, kind, site):
        if kind != "hello":
            reached("answered", self.kind, self.round, site)
    def phase_finished(self, record):
        reached("logged", record["kind"], record["round"])

save, manifest, folder = checkpoints.save, checkpoints.write_json, rounds.write_folder

def saved(place, checkpoint, *more):
    save(place, checkpoint, *more)
    reached("saved", checkpoint.round)

def writing(path, values):
    reached("writing", values["round"])
    manifest(path, values)

def exporting(path, fill):
    def half(place):
        fill(place)
        reached("exporting")
    folder(path, half)

checkpoints.save, checkpoints.write_json, rounds.write_folder = saved, writing, exporting
if RESUME:
    runs.resume(Path(OUTPUT), watch=Watching())
else:
    runs.simulate(config_from_json(CONFIG), Path(OUTPUT), watch=Watching())
"""

# Forked from a process that holds the libraries already: a fresh one takes seconds to import them.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(
    ["fedgraft.simulations.run", "fedgraft.simulations.app", "transformers.models.bert.modeling_bert"]
)


def start(config: RunConfig, output: Path, at: tuple[Any, ...], *, resume: bool = False, wait: bool = False) -> Any:
    """The run in a process of its own, which stops for good (or, with ``wait``, waits) at ``at``."""
    given = {
        "__name__": "child",
        "CONFIG": config.to_json(),
        "OUTPUT": str(output),
        "AT": at,
        "MARK": f"{output}.mark",
        "RESUME": resume,
        "WAIT": wait,
    }
    process = _START.Process(target=exec, args=(CHILD, given), daemon=True)
    process.start()
    return process


def kill(config: RunConfig, output: Path, at: tuple[Any, ...], *, resume: bool = False) -> None:
    """Run (or resume) until ``at``, where SIGKILL ends it."""
    process = start(config, output, at, resume=resume)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"the run never came to {at}"


def spent(output: Path, site: str) -> tuple[Any, ...]:
    return Ledger(output / "sites" / site / "ledgers").events()


@pytest.fixture(scope="module")
def whole(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing disturbed."""
    return dict(tiny_federation.run(tiny_federation.config(), tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def finished(tiny_federation: Any, tmp_path: Path) -> Path:
    """A finished run of its own, to be damaged."""
    tiny_federation.run(tiny_federation.config(), tmp_path / "run")
    return tmp_path / "run"


# Killed


@pytest.mark.parametrize(
    ("at", "from_round"),
    [
        (("answered", "evaluate", 0, "north"), 0),
        (("step", "train", 1, "south", 3), 0),
        (("saved", 1), 1),
        (("step", "train", 2, "north", 2), 1),
        (("logged", "train", 2), 1),
        (("writing", 2), 1),
        (("saved", 2), 2),
        (("answered", "evaluate", 2, "east"), 2),
        (("logged", "evaluate", 2), 2),
        (("saved", 3), 3),
        (("exporting",), 3),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    at: tuple[Any, ...],
    from_round: int,
    tiny_federation: Any,
    tinyfederation: ModuleType,
    tmp_path: Path,
    whole: dict[str, Any],
) -> None:
    folder = tmp_path / "run"
    kill(tiny_federation.config(), folder, at)
    before = json.loads((folder / "run.json").read_text())
    assert before["status"] == "running"
    result = tiny_federation.resume(tiny_federation.config(), folder)
    assert result["digest"] == whole["digest"]
    assert (result["status"], result["rounds"], result["run"]) == ("finished", 3, before["run"])
    assert [again["from_round"] for again in result["resumed"]] == [from_round]
    # The record is that of one run: no round twice, none left out, the same numbers.
    for key in ("accuracy", "loss", "bytes_full_model"):
        assert result[key] == whole[key]
    for kind, rounds in (("train", [1, 2, 3]), ("evaluate", [0, 1, 2, 3])):
        assert [line["round"] for line in tinyfederation.metrics(folder, kind)] == rounds
    assert not list(folder.rglob("*.new"))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()


def test_a_run_killed_again_and_again_still_ends_the_same(
    tiny_federation: Any, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config()
    kill(config, folder, ("step", "train", 1, "north", 1))
    kill(config, folder, ("saved", 1), resume=True)
    kill(config, folder, ("logged", "train", 2), resume=True)
    kill(config, folder, ("step", "train", 3, "south", 2), resume=True)
    result = tiny_federation.resume(config, folder)
    assert result["digest"] == whole["digest"]
    assert [again["from_round"] for again in result["resumed"]] == [0, 1, 1, 2]


def test_a_run_killed_before_it_said_anything_is_begun_anew(
    tiny_federation: Any, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config()
    kill(config, folder, ("saved", 0))
    with pytest.raises(UserError, match=r"holds no run \(no run\.json\)"):
        tiny_federation.resume(config, folder)
    assert tiny_federation.run(config, folder)["digest"] == whole["digest"]


@pytest.mark.parametrize(
    ("kills", "repeated"),
    [
        ([("saved", 3)], {}),
        ([("step", "train", 2, "north", 2)], {"east": 3, "north": 3}),
        pytest.param(
            [("step", "train", 1, "east", 1), ("step", "train", 2, "south", 1)],
            {"east": 6, "north": 3, "south": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["after the last checkpoint", "in training", "twice"],
)
def test_a_killed_private_run_counts_every_step_and_keeps_its_promise(
    kills: list[tuple[Any, ...]],
    repeated: dict[str, int],
    tiny_federation: Any,
    tinyfederation: ModuleType,
    tmp_path: Path,
) -> None:
    folder, config = tmp_path / "run", tiny_federation.private()
    for number, at in enumerate(kills):
        kill(config, folder, at, resume=number > 0)
    planned = {site: spent(folder, site) for site in tinyfederation.SITES}
    result = tiny_federation.resume(config, folder)
    for site in tinyfederation.SITES:
        events = spent(folder, site)
        steps = sum(event.steps for event in events)
        assert steps == 9 + repeated.get(site, 0)
        assert events[: len(planned[site])] == planned[site]
        told = result["sites"][site]
        assert told["privacy"]["steps"] == steps
        assert told["epsilon"] == told["privacy"]["epsilon"] == epsilon(events, 1e-3)
        assert told["epsilon"] <= 2.0
        # What was spent twice is paid for by more noise in what is left.
        noises = [event.noise_multiplier for event in events]
        assert (noises[-1] > noises[0]) == bool(repeated.get(site))
        assert told["privacy"]["noise_multiplier"] == noises[-1]


def test_a_private_run_with_a_fixed_noise_stops_where_the_promise_would_break(
    tiny_federation: Any, tmp_path: Path
) -> None:
    """Its noise is just enough for nine steps; a repeated round is too much for it."""
    probe = tiny_federation.private(rounds=1, **{"train.local_steps": 9})
    tiny_federation.run(probe, tmp_path / "probe")
    noise = max(spent(tmp_path / "probe", site)[0].noise_multiplier for site in ("east", "north", "south"))
    config = tiny_federation.private(**{"privacy.noise_multiplier": noise})
    folder = tmp_path / "run"
    kill(config, folder, ("logged", "train", 3))
    with pytest.raises(UserError, match=r"more than privacy\.epsilon 2; raise privacy\.noise_multiplier"):
        tiny_federation.resume(config, folder)
    assert sum(event.steps for event in spent(folder, "east")) == 9


# Running


def test_a_running_run_is_not_resumed_by_another_process(
    tiny_federation: Any, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config()
    process = start(config, folder, ("step", "train", 2, "north", 1), wait=True)
    try:
        deadline = time.monotonic() + 120
        while not Path(f"{folder}.mark").exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        lines = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError) as caught:
            tiny_federation.resume(config, folder)
        assert str(caught.value) == f"{folder}: another process is running this run"
        with pytest.raises(UserError, match="already holds a run"):
            tiny_federation.run(config, folder)
        assert (folder / "metrics.jsonl").read_bytes() == lines
        assert process.is_alive()
    finally:
        process.kill()
        process.join(30)
    assert tiny_federation.resume(config, folder)["digest"] == whole["digest"]


# Damaged


def _flip(path: Path) -> None:
    content = bytearray((path / "adapter.safetensors").read_bytes())
    content[len(content) // 2] ^= 8
    (path / "adapter.safetensors").write_bytes(content)


def _cut(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_manifest(path: Path) -> None:
    (path / "checkpoint.json").unlink()


@pytest.mark.parametrize("damage", [_flip, _cut, _no_manifest])
def test_a_damaged_checkpoint_is_told_and_the_run_ends_the_same(
    damage: Callable[[Path], None],
    finished: Path,
    tiny_federation: Any,
    tinyfederation: ModuleType,
    whole: dict[str, Any],
) -> None:
    last = finished / "checkpoints" / "round-0003"
    damage(last)
    notes = tinyfederation.Notes()
    result = tiny_federation.resume(tiny_federation.config(), finished, watch=notes)
    assert result["digest"] == whole["digest"]
    (said,) = [text for text in notes.texts if "corrupt" in text]
    assert said.startswith(f"{last}: the checkpoint is corrupt (")
    assert said.endswith("; falling back to the checkpoint before it")
    assert [(again["from_round"], again["note"]) for again in result["resumed"]] == [(2, said)]
    assert [line["round"] for line in tinyfederation.metrics(finished, "train")] == [1, 2, 3]


def test_without_a_whole_checkpoint_the_run_is_left_as_it_is(finished: Path, tiny_federation: Any) -> None:
    for path in (finished / "checkpoints").iterdir():
        _flip(path)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        tiny_federation.resume(tiny_federation.config(), finished)
    assert str(caught.value) == (f"{finished}/checkpoints: none of the 3 checkpoints is whole; start the run again")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_torn_last_line_of_the_metrics_is_dropped(
    finished: Path, tiny_federation: Any, tinyfederation: ModuleType, whole: dict[str, Any]
) -> None:
    path = finished / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    _no_manifest(finished / "checkpoints" / "round-0003")
    result = tiny_federation.resume(tiny_federation.config(), finished)
    assert result["accuracy"] == whole["accuracy"]
    assert [line["round"] for line in tinyfederation.metrics(finished, "evaluate")] == [0, 1, 2, 3]


class Remembering(averaging.FedIT):
    """Momentum over rounds: what comes next depends on more than the present adapter."""

    _momentum: AdapterState | None = None

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self._before = state

    def result(self) -> AdapterState:
        mean = super().result()
        step = mean - self._before.only(mean)
        if self._momentum is not None:
            step = step + 0.5 * self._momentum
        self._momentum = step
        return self._before.only(mean) + step

    def memory(self) -> dict[str, AdapterState]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        self._momentum = memory.get("momentum")


def test_what_a_strategy_remembers_survives(
    tiny_federation: Any, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aggregator._STRATEGIES, "remembering", Remembering)
    config = tiny_federation.config(strategy="remembering")
    first = tiny_federation.run(config, tmp_path / "run")
    assert first["digest"] != whole["digest"]
    _no_manifest(tmp_path / "run" / "checkpoints" / "round-0003")
    again = tiny_federation.resume(config, tmp_path / "run")
    assert again["digest"] == first["digest"]
    # All attempts together took their time.
    assert again["seconds"] > first["seconds"]


def test_another_base_model_is_refused(
    finished: Path, tiny_federation: Any, tinymodels: ModuleType, tmp_path: Path
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_federation.model, model)
    values = json.loads((finished / "run.json").read_text())
    values["config"]["model"] = str(model)
    (finished / "run.json").write_text(json.dumps(values))
    assert tiny_federation.resume(tiny_federation.config(), finished)["status"] == "finished"
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    # Another process would load the changed files; this one remembers the model by its folder.
    from fedgraft.client.resident import forget_all

    forget_all()
    with pytest.raises(UserError, match=r"was begun with another base model \(fingerprint [0-9a-f]{12}, now"):
        tiny_federation.resume(tiny_federation.config(), finished)


def test_a_checkpoint_of_another_adapter_is_refused(finished: Path, tiny_federation: Any) -> None:
    values = json.loads((finished / "run.json").read_text())
    values["config"]["method"]["rank"] = 2
    (finished / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        tiny_federation.resume(tiny_federation.config(), finished)
    assert str(caught.value) == (
        f"{finished}/checkpoints: holds a lora adapter of rank 4, the configuration asks for lora of rank 2"
    )


# Extended


def test_a_finished_run_is_extended_to_what_a_longer_one_would_have_been(
    finished: Path, tiny_federation: Any, tmp_path: Path, whole: dict[str, Any]
) -> None:
    same = tiny_federation.resume(tiny_federation.config(), finished)
    assert (same["digest"], same["rounds"]) == (whole["digest"], 3)
    longer = tiny_federation.run(tiny_federation.config(rounds=5), tmp_path / "longer")
    extended = tiny_federation.resume(tiny_federation.config(), finished, rounds=5)
    assert extended["digest"] == longer["digest"] != whole["digest"]
    assert extended["rounds"] == extended["config"]["rounds"] == 5
    with RunDirectory.open(finished) as rundir:
        assert rundir.config().rounds == 5


def test_a_private_run_that_spent_its_budget_is_not_extended(tiny_federation: Any, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tiny_federation.private()
    first = tiny_federation.run(config, folder)
    before = {site: spent(folder, site) for site in first["sites"]}
    with pytest.raises(UserError) as caught:
        tiny_federation.resume(config, folder, rounds=4)
    assert re.search(r"^site east: privacy\.epsilon 2 leaves so little after what was already spent", str(caught.value))
    assert str(caught.value).endswith("; or end the run as it is: --resume with --set rounds=3")
    assert {site: spent(folder, site) for site in before} == before
    # As the line says:
    again = tiny_federation.resume(config, folder, rounds=3)
    assert (again["status"], again["digest"]) == ("finished", first["digest"])
    assert {site: told["epsilon"] for site, told in again["sites"].items()} == {
        site: epsilon(events, 1e-3) for site, events in before.items()
    }


def test_a_private_run_killed_in_its_last_training_can_be_ended_as_it_was(tiny_federation: Any, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tiny_federation.private()
    kill(config, folder, ("logged", "train", 3))
    with pytest.raises(UserError, match=r"after what was already spent.*--set rounds=2$"):
        tiny_federation.resume(config, folder)
    result = tiny_federation.resume(config, folder, rounds=2)
    assert (result["status"], result["rounds"]) == ("finished", 2)
    # The third round is not in the adapter, but what it cost is in the epsilon.
    for site, told in result["sites"].items():
        assert told["privacy"]["steps"] == 9
        assert told["epsilon"] == epsilon(spent(folder, site), 1e-3) <= 2.0


def test_a_run_cannot_be_resumed_into_fewer_rounds(finished: Path, tiny_federation: Any) -> None:
    with pytest.raises(UserError) as caught:
        tiny_federation.resume(tiny_federation.config(), finished, rounds=2)
    assert str(caught.value) == (
        f"{finished}: has 3 rounds behind it, which rounds = 2 cannot undo; give that many or more"
    )
