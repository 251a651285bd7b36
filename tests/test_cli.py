"""The command line: what it prints, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from fedgraft import __version__, cli
from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.server import report as reports
from fedgraft.simulations import doctor
from fedgraft.simulations import run as runs


@pytest.fixture(autouse=True)
def _site_log() -> Iterator[None]:
    """`main` silences the sites' log for its process, which here is that of all tests."""
    log, flwr = logging.getLogger("fedgraft.site"), logging.getLogger("flwr")
    before = (log.propagate, list(log.handlers), flwr.level)
    yield
    log.propagate, log.handlers[:], _ = before
    flwr.setLevel(before[2])


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a mistake."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        assert self.err.startswith("fedgraft: "), self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("fedgraft: ").strip()


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Said]:
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedgraft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def write(tiny_federation: Any, tmp_path: Path) -> Callable[..., Path]:
    """``write(**{"train.lr": 1})``: a configuration file of the tiny federation."""

    def file(**changes: Any) -> Path:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(tiny_federation.values(**changes)), encoding="utf-8")
        return path

    return file


# A run


def test_a_run_prints_one_table_and_its_paths(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    said = fedgraft("simulate", write(rounds=1), "--output", tmp_path / "run", "--set", "train.local_steps=2")
    assert said.code == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["train"]["local_steps"] == 2
    for word in ("tiny: 1 round of fedit, lora", "east", "north", "south", "all", "accuracy before"):
        assert word in said.out
    assert f"{100 * run['accuracy']['after']:.1f} %" in said.out
    assert f"adapter  {tmp_path}/run/adapter" in said.out
    assert f"report   {tmp_path}/run/report.html" in said.out
    assert "warning: differential privacy was switched off" in said.out
    # Where there is no terminal, progress is one line for each training and evaluation, on standard error.
    chosen, *progress = said.err.splitlines()
    assert chosen.startswith("engine inprocess, ")
    assert [line.split()[2] for line in progress] == ["evaluate", "train", "evaluate"]
    assert "loss" in said.err


def test_a_private_run_shows_epsilon_and_patients(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    privacy = {"enabled": True, "unit": "patient", "delta": 1e-3, "noise_multiplier": 2.0}
    said = fedgraft("simulate", write(rounds=1, privacy=privacy), "--output", tmp_path / "run")
    assert said.code == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "patients" in said.out
    assert f"≤ {max(site['epsilon'] for site in run['sites'].values()):.2f}" in said.out
    assert "warning" not in said.out
    train = said.err.splitlines()[2]
    assert "ε ≤ " in train
    assert "loss" not in train


def test_json_is_one_object_and_nothing_else(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    said = fedgraft("simulate", write(rounds=1), "--output", tmp_path / "run", "--json")
    assert said.code == 0
    assert said.out.count("\n") == 1
    printed = json.loads(said.out)
    assert set(printed) == {
        *("run", "name", "engine", "digest", "accuracy", "loss", "rounds", "sites", "strategy", "method", "warnings"),
        *("bytes_up", "bytes_down", "bytes_full_model", "seconds", "adapter", "report"),
    }
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    for key in ("digest", "accuracy", "rounds", "bytes_up", "bytes_down", "seconds"):
        assert printed[key] == run[key]
    assert set(printed["accuracy"]) == {"before", "after"}
    for name, site in printed["sites"].items():
        assert set(site) == {"records", "units", "epsilon", "delta", "unit", "accuracy", "accuracy_before"}
        assert site["records"] == run["sites"][name]["records"]
    assert Path(printed["adapter"], "adapter_model.safetensors").is_file()
    assert Path(printed["report"]).is_file()


def test_without_an_output_the_run_lies_under_runs(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    assert fedgraft("simulate", write(rounds=1)).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny-")
    assert (folder / "report.html").is_file()


def test_paths_are_printed_as_they_are(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    """Brackets in a path are no markup of the terminal's."""
    folder = tmp_path / "run[red] [/b]"
    said = fedgraft("simulate", write(rounds=1), "--output", folder)
    assert said.code == 0
    assert f"adapter  {folder}/adapter\n" in said.out


def test_the_report_is_written_anew(fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path) -> None:
    fedgraft("simulate", write(rounds=1), "--output", tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    said = fedgraft("report", tmp_path / "run")
    assert (said.code, said.out.strip(), said.err) == (0, str(page), "")
    assert page.read_bytes() == before


# Resuming


@pytest.fixture
def finished(tiny_federation: Any, tmp_path: Path) -> Path:
    tiny_federation.run(tiny_federation.config(rounds=2), tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_extended(finished: Path, fedgraft: Callable[..., Said], write: Callable[..., Path]) -> None:
    said = fedgraft("simulate", "--resume", finished, "--set", "rounds=3", "--json")
    assert said.code == 0
    assert json.loads(said.out)["rounds"] == 3
    said = fedgraft("simulate", write(rounds=4), "--resume", finished, "--json")
    assert json.loads(said.out)["rounds"] == 4


def test_a_corrupt_checkpoint_is_passed_over_and_said(finished: Path, fedgraft: Callable[..., Said]) -> None:
    before = json.loads((finished / "run.json").read_text())
    last = finished / "checkpoints" / "round-0002"
    (last / "adapter.safetensors").write_bytes(b"")
    said = fedgraft("simulate", "--resume", finished, "--json")
    assert said.code == 0
    assert json.loads(said.out)["digest"] == before["digest"]
    assert said.err.splitlines()[0] == (
        f"{last}: the checkpoint is corrupt (adapter.safetensors does not match its checksum); falling back to the "
        "checkpoint before it"
    )


def test_without_a_whole_checkpoint_the_run_is_not_resumed(finished: Path, fedgraft: Callable[..., Said]) -> None:
    for path in (finished / "checkpoints").iterdir():
        (path / "checkpoint.json").unlink()
    said = fedgraft("simulate", "--resume", finished)
    assert (said.code, said.out) == (2, "")
    *passed_over, last = said.err.splitlines()
    assert len(passed_over) == 3
    assert last == f"fedgraft: {finished}/checkpoints: none of the 3 checkpoints is whole; start the run again"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--output", "x"], "--resume goes on in its own directory; leave out --output"),
        (["--set", "train.lr=2"], "--resume with --set train.lr=2: only rounds=NUMBER may change"),
        (["--set", "rounds=two"], "--resume with --set rounds=two: only rounds=NUMBER may change"),
        (["--set", "rounds=0"], "--resume with --set rounds=0: only rounds=NUMBER may change"),
        (["--set", "rounds=-1"], "--resume with --set rounds=-1: only rounds=NUMBER may change"),
        (["--set", "rounds=1"], "has 2 rounds behind it, which rounds = 1 cannot undo; give that many or more"),
    ],
)
def test_a_run_goes_on_as_it_was_begun(
    finished: Path, fedgraft: Callable[..., Said], arguments: list[str], reason: str
) -> None:
    before = (finished / "run.json").read_bytes()
    assert reason in fedgraft("simulate", "--resume", finished, *arguments).line
    assert (finished / "run.json").read_bytes() == before


def test_a_run_does_not_go_on_with_another_configuration(
    finished: Path, fedgraft: Callable[..., Said], write: Callable[..., Path]
) -> None:
    said = fedgraft("simulate", write(rounds=3, **{"train.lr": 0.2}), "--resume", finished)
    assert said.line == f"--resume {finished}: the run was begun with another `train`; only rounds may change"


# Mistakes


#: What is changed in the configuration, the arguments beside it, and what the line must say.
MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "strategy": ({"strategy": "fedavg"}, [], "unknown strategy `fedavg`; "),
    "a strategy's name mistyped": ({"strategy": "fedti"}, [], "unknown strategy `fedti`; did you mean `fedit`?"),
    "option of a strategy": (
        {"strategy": "ffa", "strategy_options": {"bases": "random"}},
        [],
        "strategy_options.bases: strategy `ffa` has no such option; did you mean `basis`?",
    ),
    "strategy for another method": (
        {"strategy": "ffa", "method": {"name": "bitfit"}},
        [],
        "strategy `ffa` freezes the factor A of a low-rank method; bitfit has none: choose lora",
    ),
    "method": ({"method.name": "lorra"}, [], "unknown method `lorra`; did you mean `lora`?"),
    "method without exact gradients": (
        {"method.name": "dora", "privacy": {"delta": 1e-3, "noise_multiplier": 2.0, "engine": "opacus"}},
        [],
        "has no exact per-sample gradient",
    ),
    "target module": (
        {"method.target_modules": ["querry"]},
        [],
        "method.target_modules: the model has no module `querry`",
    ),
    "task": ({"task.name": "regression"}, [], "unknown task `regression`; there are "),
    "key in the file": ({"train.learning_rate": 1}, [], "unknown key `train.learning_rate`"),
    "key in the file, mistyped": ({"train.local_step": 1}, [], "did you mean `train.local_steps`?"),
    "key in an override": ({}, ["--set", "privacy.epsilom=1"], "did you mean `privacy.epsilon`?"),
    "override without a value": ({}, ["--set", "rounds"], "--set rounds: write it as key=value"),
    "value of another kind": ({}, ["--set", "rounds=many"], "`rounds`: Input should be a valid integer"),
    "no rounds": ({"rounds": -1}, [], "`rounds`: Input should be greater than or equal to 0"),
    "engine": ({}, ["--engine", "ray"], "unknown engine `ray`; there are auto, inprocess, workers, flower"),
    "source of data": ({"data.source": "icd11"}, [], "data.source `icd11` is unknown; there are digits, files, icd10"),
    "no data": ({"data.path": "nowhere.csv"}, [], "nowhere.csv: no such file"),
    "missing text column": (
        {"data.text_column": "note"},
        [],
        "records.csv: no column `note` (columns: text, label, patient); set data.text_column",
    ),
    "missing label column": ({"data.label_column": "code"}, [], "set data.label_column"),
    "missing patient column": (
        {"data.patient_column": "who", "privacy": {"unit": "patient", "delta": 1e-3}},
        [],
        'the privacy unit is the patient, so set data.patient_column, or privacy.unit = "record"',
    ),
    "label outside the set": (
        {"task.labels": ["class-zebra", "class-yak"]},
        [],
        "record 3 has the label `class-walrus`, which is not in task.labels",
    ),
    "no label set": ({"task.labels": []}, [], "say the label set in task.labels; this file has ['class-walrus', "),
    "empty site": (
        {"data.sites": [f"site-{number}" for number in range(400)]},
        [],
        "raise data.alpha, or use fewer sites",
    ),
    "two sites of one name": ({"data.sites": ["a", "a"]}, [], "two sites have the same name"),
    "quorum": ({"server.quorum": 4}, [], "server.quorum is 4 but there are 3 sites"),
    "rank of a site": (
        {"data.sites": [{"name": "a"}, {"name": "b", "rank": 2}]},
        [],
        "site b has rank 2, the run has method.rank 4, and strategy `fedit` cannot mix ranks; give all sites one rank",
    ),
    "model": ({"model": "/nowhere/model"}, [], "model /nowhere/model: no such folder"),
    "model of a package": ({"model": "package:nopackage/x"}, [], "the Python package nopackage is not installed"),
    "adapter to start from": ({"start_from": "/nowhere/adapter"}, [], "not a PEFT adapter folder"),
    "device": ({"train.device": "tpu"}, [], "train.device `tpu` is not there; use cpu, or auto to take what there is"),
    "text too long": ({"task.max_length": 500}, [], "task.max_length is 500, but the model takes 64 tokens"),
    "epsilon": (
        {"privacy": {"epsilon": 1e-4, "delta": 1e-6}},
        [],
        "privacy.epsilon 0.0001 at delta 1e-06 cannot be reached in 9 steps",
    ),
    "noise too small for epsilon": (
        {"privacy": {"epsilon": 1, "delta": 1e-3, "noise_multiplier": 0.4}},
        [],
        "more than privacy.epsilon 1; raise privacy.noise_multiplier, or leave it out to have it chosen",
    ),
    "delta": ({"privacy": {"delta": 0.1}}, [], "privacy.delta 0.1 is not below 1/"),
    "batch": (
        {"privacy": {"delta": 1e-3}, "train.batch_size": 500},
        [],
        "train.batch_size 500 is more than the site's",
    ),
    "precision": (
        {"privacy": {"delta": 1e-3}, "train.precision": "fp16"},
        [],
        "train.precision fp16 needs loss scaling, which would rescale the clipping; use bf16 or fp32",
    ),
    "output that cannot be made": ({}, ["--output", "/proc/fedgraft"], "/proc/fedgraft: cannot be written: "),
    "output that is a file": ({}, ["--output", "tiny.json"], "tiny.json: cannot be written: File exists"),
    "run that is not there": ({}, ["--resume", "nowhere"], "nowhere: holds no run (no run.json)"),
    "option": ({}, ["--outptu", "x"], "No such option"),
    "argument": ({}, ["another.toml"], "Got unexpected extra argument"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path
) -> None:
    changes, arguments, reason = MISTAKES[name]
    output = [] if "--output" in arguments or "--resume" in arguments else ["--output", tmp_path / "run"]
    said = fedgraft("simulate", write(**changes), *output, *arguments)
    assert reason in said.line
    assert not (tmp_path / "run").exists(), "a run that never began left a folder"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["simulate"], "say what to run: a configuration file, a scenario such as hospitals-icd10, or --resume DIR"),
        (["simulate", "hospital-icd10"], "did you mean `hospitals-icd10`?"),
        (["simulate", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["simulate", "."], ".: is a folder, not a configuration file"),
        (["simulate", "broken.toml"], "broken.toml: not valid TOML: "),
        (["simulate", "--output"], "Option '--output' requires an argument; see fedgraft --help"),
        (["report", "nowhere"], "nowhere: holds no run (no run.json)"),
        (["report"], "Missing argument"),
        (["simulat"], "No such command 'simulat'"),
    ],
)
def test_a_mistake_before_any_configuration_is_one_line(
    arguments: list[str], reason: str, fedgraft: Callable[..., Said], tmp_path: Path
) -> None:
    (tmp_path / "broken.toml").write_text("rounds =")
    assert reason in fedgraft(*arguments).line


def test_a_site_with_another_base_model_is_one_line(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tiny_federation: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_federation.model, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    sites = [{"name": "east"}, {"name": "north", "model": str(other)}, {"name": "south"}]
    said = fedgraft("simulate", write(**{"data.sites": sites}), "--output", tmp_path / "run")
    assert said.line.startswith("site north holds another base model (fingerprint ")
    assert said.line.endswith("; give every site the same files")
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_rank_is_one_line(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tiny_federation: Any, tmp_path: Path
) -> None:
    first = tiny_federation.run(tiny_federation.config(rounds=1, **{"method.rank": 2}), tmp_path / "first")
    said = fedgraft("simulate", write(start_from=first["adapter_path"]), "--output", tmp_path / "run")
    assert said.line.startswith(f"{first['adapter_path']}: its r is 2, this run's is 4")
    assert not (tmp_path / "run").exists()


def test_an_empty_file_of_a_site_is_one_line(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tiny_federation: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty.csv").write_text("text,label,patient\n")
    sites = [
        {"name": "east", "path": str(tiny_federation.table)},
        {"name": "north", "path": str(tmp_path / "empty.csv")},
    ]
    said = fedgraft("simulate", write(**{"data.sites": sites, "data.path": ""}), "--output", tmp_path / "run")
    assert said.line == f"site north: {tmp_path}/empty.csv: holds no records"


def test_a_run_that_is_there_is_not_written_over(
    finished: Path, fedgraft: Callable[..., Said], write: Callable[..., Path]
) -> None:
    said = fedgraft("simulate", write(), "--output", finished)
    assert said.line == f"{finished}: already holds a run; choose another --output, or --resume it"


def test_a_disk_that_fills_up_ends_the_run_in_one_line(
    fedgraft: Callable[..., Said], write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: AdapterState, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AdapterState, "save", full)
    said = fedgraft("simulate", write(), "--output", tmp_path / "run")
    assert said.line == (
        f"{tmp_path}/run/checkpoints/round-0000: cannot be written: No space left on device; free the disk or choose "
        "another --output"
    )


def test_an_image_that_cannot_be_read_is_told_to_whoever_simulates(
    fedgraft: Callable[..., Said], tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    """The site tells the server only that it failed; here the person before the terminal is the site."""
    from PIL import Image

    for number in range(8):
        folder = tmp_path / "images" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
    (tmp_path / "images" / "dark" / "1.png").write_bytes(b"no image")
    config = {
        "model": tiny_model("vit", "image-classification"),
        "rounds": 1,
        "task": {"name": "image-classification", "labels": ["dark", "light"]},
        "train": {"local_steps": 1, "batch_size": 8, "device": "cpu"},
        "privacy": {"enabled": False},
        "data": {"path": str(tmp_path / "images"), "sites": ["north"], "partition": "iid", "test_fraction": 0.4},
    }
    (tmp_path / "images.json").write_text(json.dumps(config))
    said = fedgraft("simulate", tmp_path / "images.json", "--output", tmp_path / "run")
    assert (said.code, said.out) == (2, "")
    assert "images/dark/1.png: not an image that can be read" in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith("fedgraft: site north: its data cannot be used;")
    assert "Traceback" not in said.err


def test_a_defect_is_no_mistake_of_the_user(
    fedgraft: Callable[..., Said], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(runs, "simulate", broken)
    monkeypatch.setattr(sys, "argv", ["fedgraft", "simulate", str(write())])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()


def test_a_stopped_run_says_that_it_can_be_resumed(
    fedgraft: Callable[..., Said], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "simulate", stopped)
    said = fedgraft("simulate", write())
    assert (said.code, said.out) == (130, "")
    assert said.err == "fedgraft: stopped; a run that had begun can be resumed with --resume\n"


# The other commands


@pytest.mark.parametrize("command", ["strategies", "methods"])
def test_what_there_is_is_listed(fedgraft: Callable[..., Said], command: str) -> None:
    rows = json.loads(fedgraft(command, "--json").out)
    said = fedgraft(command)
    assert said.code == 0
    names = [row["name"] for row in rows]
    assert names == sorted(names)
    assert {"fedit", "ffa"} <= set(names) or {"lora", "bitfit", "dora"} <= set(names)
    for row in rows:
        assert row["summary"] and row["source"]
        assert row["name"] in said.out


def test_the_version_is_printed(fedgraft: Callable[..., Said]) -> None:
    said = fedgraft("--version")
    assert (said.code, said.out, said.err) == (0, f"{__version__}\n", "")


def test_without_a_command_there_is_help(fedgraft: Callable[..., Said]) -> None:
    said = fedgraft()
    assert said.code == 2
    for command in ("simulate", "report", "strategies", "methods", "doctor"):
        assert command in said.out


def test_the_doctor_finds_this_machine_well(fedgraft: Callable[..., Said]) -> None:
    said = fedgraft("doctor")
    assert said.code == 0
    assert " no " not in said.out.replace("│", " ")
    for check in ("accountant", "noise", "clipping", "torch", "device"):
        assert check in said.out


def test_the_doctor_fails_where_a_check_does(fedgraft: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(*args: Any) -> float:
        return 1.5

    monkeypatch.setattr(doctor, "epsilon", weak)
    said = fedgraft("doctor")
    assert said.code == 2
    assert said.err == "fedgraft: 1 of the checks failed\n"
    assert "epsilon 1.5000 where 1.828 is right" in said.out


def test_the_doctor_sees_noise_and_clipping_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgraft.privacy.clipping import ClippedGradients
    from fedgraft.privacy.noise import RandomStream

    assert all(good for _, good, _ in doctor.checks())
    normal = RandomStream.normal
    with monkeypatch.context() as patch:
        patch.setattr(RandomStream, "normal", lambda stream, count: normal(stream, count) * 0.5)
        assert [name for name, good, _ in doctor.checks() if not good] == ["noise"]

    with monkeypatch.context() as patch:
        init = ClippedGradients.__init__
        patch.setattr(ClippedGradients, "__init__", lambda self, model, t, clip: init(self, model, t, 2 * clip))
        assert [name for name, good, _ in doctor.checks() if not good] == ["clipping"]


def test_the_report_tells_a_user_error(fedgraft: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Path:
        raise UserError("two\nlines\x1b[31m")

    monkeypatch.setattr(reports, "write_report", refuse)
    line = fedgraft("report", "x").line
    assert line.isprintable()


@pytest.mark.slow
def test_the_installed_command_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    """As a person starts it: nothing of a library, nor a traceback, joins the line."""
    for command in ([str(Path(sys.executable).with_name("fedgraft"))], [sys.executable, "-m", "fedgraft"]):
        done = subprocess.run(
            [*command, "simulate", "hospitals-icd10", "--set", "strategy=nonsense"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": ""},
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("fedgraft: unknown strategy `nonsense`; there are ")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_computes_nothing_does_not_load_torch() -> None:
    script = (
        "import sys, fedgraft.cli, fedgraft.client.site.supernode, fedgraft.server.deployed.serving\n"
        "print([name for name in ('torch', 'transformers', 'opacus', 'peft') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command below ``command``, by its words."""
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


def test_every_argument_and_option_says_what_it_is() -> None:
    silent = [
        f"{name} {parameter.name}"
        for name, command in _commands(typer.main.get_command(cli.app))
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and not getattr(parameter, "help", None)
    ]
    assert silent == []
