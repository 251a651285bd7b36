"""`fedgraft methods laplace` on an adapter that a tiny federation trained."""

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
from fedgraft.simulations.laplace.commands import app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_federation: Any) -> Path:
    """A run with its adapter, its job, public records, and records without labels."""
    folder = tmp_path_factory.mktemp("laplace")
    config = tiny_federation.config(**{"method.name": "laplace-lora", "rounds": 2})
    tiny_federation.run(config, folder / "run")
    (folder / "job.json").write_text(config.to_json())
    lines = Path(tiny_federation.table).read_text().splitlines()
    (folder / "public.csv").write_text("\n".join(lines[:61]) + "\n")
    (folder / "new.csv").write_text("text\nheart heart heart\nlung\n")
    return folder


def said(place: Path, *more: str, data: str = "public.csv") -> str:
    words = ["laplace", str(place / "job.json"), str(place / "run"), "--data", str(place / data), *more]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_adapter_is_measured_with_and_without_and_predicts(place: Path) -> None:
    output = place / "said.jsonl"
    found = json.loads(said(place, "--json", "--records", str(place / "new.csv"), "-o", str(output)))
    assert found["records"] + found["held_out"] == 60
    assert found["laplace"] != found["plain"] and found["precision"] > 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 2
    config = load_config(place / "job.json")
    task = create_task(config.task)
    base = task.load(config.model, config.task, config.seed)
    adapter = attach(base, config.method, task, config.seed)
    adapter.load_peft(place / "run" / "adapter")
    for text, row in zip(("heart heart heart", "lung"), rows, strict=True):
        batch = task.collate(task.encode([text], None, base.processor), base.processor)
        plain = task.logits(adapter.model, batch).softmax(-1)[0].tolist()  # type: ignore[attr-defined]
        assert sum(row["chances"].values()) == pytest.approx(1)
        assert row["label"] == max(row["chances"], key=row["chances"].get)
        # An average over scores around the adapter's own is less sure than these.
        assert max(row["chances"].values()) < max(plain)
        assert list(row["chances"]) == list(config.task.labels)


def test_the_table_says_what_was_measured(place: Path) -> None:
    table = said(place)
    assert "adapter alone" in table and "with Laplace" in table and "calibration error" in table


def test_what_would_tell_of_patients_or_makes_no_sense_is_refused(place: Path, tiny_federation: Any) -> None:
    with pytest.raises(UserError, match="records of the job's sites, and what is made of them would cost epsilon"):
        said(place, data=str(tiny_federation.table))
    with pytest.raises(UserError, match=r"method\.name is pfeiffer: the Laplace approximation is of laplace-lora"):
        said(place, "--set", "method.name=pfeiffer")
    with pytest.raises(UserError, match="--records and --output go together"):
        said(place, "--records", str(place / "new.csv"))
