"""`fedgraft methods search` on a tiny model and a public file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedgraft.core.config import load_config
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task
from fedgraft.methods import attach
from fedgraft.server.method_card import count_of
from fedgraft.simulations.search.commands import app


@pytest.fixture
def job(tiny_federation: Any, tmp_path: Path) -> Path:
    """A job under privacy, and beside it a file of sixty public records."""
    config = tiny_federation.config()
    labels = ", ".join(json.dumps(label) for label in config.task.labels)
    (tmp_path / "job.toml").write_text(
        f'model = "{tiny_federation.model}"\nseed = 3\n[task]\nlabels = [{labels}]\nmax_length = 32\n'
        '[train]\nlr = 0.01\noptimizer = "adamw"\nbatch_size = 16\ndevice = "cpu"\n'
        f'[data]\npath = "{tiny_federation.table}"\nsites = ["a", "b"]\n'
    )
    lines = Path(tiny_federation.table).read_text().splitlines()
    (tmp_path / "public.csv").write_text("\n".join(lines[:61]) + "\n")
    return tmp_path / "job.toml"


def said(job: Path, *more: str, data: str = "public.csv", trials: int = 4, output: str = "search.json") -> str:
    words = ["search", str(job), "--data", str(job.parent / data), "--trials", str(trials), "--random", "3"]
    words += ["--steps", "3", "-o", str(job.parent / output), *more]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def without_times(path: Path) -> Any:
    found = json.loads(path.read_text())
    return {**found, "trials": [{**trial, "seconds": 0} for trial in found["trials"]]}


def test_a_search_that_was_stopped_goes_on_to_what_it_would_have_found(job: Path) -> None:
    whole, part = job.parent / "whole.json", job.parent / "part.json"
    table = said(job, output="whole.json")
    said(job, output="part.json", trials=2)
    assert len(json.loads(part.read_text())["trials"]) == 2
    said(job, output="part.json")
    found = without_times(whole)
    assert without_times(part) == found
    trials = found["trials"]
    assert len({json.dumps({**trial, "accuracy": 0}) for trial in trials}) == len(trials) == 4
    assert found["records"] + found["held_out"] == 60
    assert "4 trials of 3 steps" in table

    best = [
        trial
        for trial in trials
        if not any(
            other["numbers"] <= trial["numbers"]
            and other["accuracy"] >= trial["accuracy"]
            and (other["numbers"], other["accuracy"]) != (trial["numbers"], trial["accuracy"])
            for other in trials
        )
    ]
    lines = [line.replace("'", "").split() for line in table.splitlines() if "--set" in line]
    assert len(lines) == len({(trial["numbers"], trial["accuracy"]) for trial in best})
    for words in lines:
        config = load_config(job, words[2::2])
        base = create_task(config.task).load(config.model, config.task, config.seed)
        spec = attach(base, config.method, create_task(config.task), config.seed).spec
        assert any(trial["numbers"] == count_of(spec).adapter for trial in best)


def test_json_is_the_file(job: Path) -> None:
    assert json.loads(said(job, "--json", trials=1)) == json.loads((job.parent / "search.json").read_text())


def test_records_of_the_jobs_sites_are_refused(job: Path, tiny_federation: Any) -> None:
    with pytest.raises(UserError, match="records of the job's sites, and what is made of them would cost epsilon"):
        said(job, data=str(tiny_federation.table))
    own = f'data.sites=[{{name="a", path="{job.parent / "public.csv"}"}}]'
    with pytest.raises(UserError, match="records of the job's sites"):
        said(job, "--set", own)
    assert not (job.parent / "search.json").exists()


def test_a_file_of_another_search_is_not_gone_on_with(job: Path) -> None:
    said(job, trials=1)
    with pytest.raises(UserError, match=r"search\.json: holds a search with another --seed; choose another --output"):
        said(job, "--seed", "1")
    with pytest.raises(UserError, match="with another job, --set, --steps or --data"):
        said(job, "--set", "train.lr=0.5")
    (job.parent / "search.json").write_text("[]")
    with pytest.raises(UserError, match="no results of a search"):
        said(job)
