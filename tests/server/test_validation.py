"""Scores of adapters on the server's own records, against a count of right answers one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task
from fedgraft.methods import attach
from fedgraft.server.validation import make_score


def on_server(config: RunConfig) -> tuple[Any, Any, Any]:
    task = create_task(config.task)
    base = task.load(config.model, config.task, config.seed)
    return base, attach(base, config.method, task, config.seed), task


def shaken(state: AdapterState, seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return state.map(lambda array: array + 0.5 * random.standard_normal(array.shape))


@pytest.fixture
def records(tiny_federation: Any, tmp_path: Path) -> Path:
    """Forty records without patients, the texts of uneven length."""
    path = tmp_path / "validation.jsonl"
    rows = [{"text": row["text"], "label": row["label"]} for row in tiny_federation.rows[:40]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_score_is_the_share_of_right_answers(tiny_federation: Any, records: Path) -> None:
    config = tiny_federation.config(**{"server.validation": str(records), "evaluate.batch_size": 7})
    base, adapter, task = on_server(config)
    score = make_score(config, base, adapter, task)
    fresh = adapter.read()
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    seen = set()
    for seed in range(3):
        state = shaken(fresh, seed)
        got = score(state)
        adapter.write(state)
        right = 0
        for row in rows:
            label = config.task.labels.index(row["label"])
            examples = task.encode([row["text"]], [label], base.processor)
            batch = task.collate(examples, base.processor)
            with torch.no_grad():
                logits = adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            right += int(logits.argmax()) == label
        assert got == right / len(rows)
        seen.add(got)
    assert len(seen) > 1, "the score tells adapters apart"


def test_scores_hang_on_the_adapter_alone(tiny_federation: Any, records: Path) -> None:
    config = tiny_federation.config(**{"server.validation": str(records)})
    base, adapter, task = on_server(config)
    score = make_score(config, base, adapter, task)
    states = [shaken(adapter.read(), seed) for seed in range(3)]
    first = [score(state) for state in states]
    assert [score(state) for state in reversed(states)] == first[::-1]


def test_patients_are_not_asked_for_even_where_they_are_the_privacy_unit(tiny_federation: Any, records: Path) -> None:
    config = tiny_federation.private(**{"server.validation": str(records)})
    assert config.privacy.unit == "patient"
    base, adapter, task = on_server(config)
    assert 0 <= make_score(config, base, adapter, task)(adapter.read()) <= 1


def test_what_cannot_be_read_is_named(tiny_federation: Any, tmp_path: Path, records: Path) -> None:
    for path, told in (
        ("", r"server\.validation names no file"),
        (str(tmp_path / "nowhere.csv"), r"nowhere\.csv: no such file"),
        (str(records.with_suffix(".txt")), r"validation\.txt: no such file"),
    ):
        config = tiny_federation.config(**{"server.validation": path})
        with pytest.raises(UserError, match=told):
            make_score(config, *on_server(config))
    records.write_text('{"text": "a b", "label": "class-zebra"}\n{"text": "c", "label": "horse"}\n', encoding="utf-8")
    config = tiny_federation.config(**{"server.validation": str(records)})
    with pytest.raises(UserError, match=r"validation\.jsonl: record 2 has the label `horse`"):
        make_score(config, *on_server(config))
