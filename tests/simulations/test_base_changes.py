"""Strategies that change base weights, in whole runs: what is exported, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedgraft.client.evaluation import evaluate
from fedgraft.client.resident import forget_all, resident
from fedgraft.core.adapter import AdapterState, offset_a
from fedgraft.server.checkpoints import load_last

MIXED = [{"name": "east", "rank": 1}, {"name": "north", "rank": 2}, {"name": "south"}]


@pytest.mark.parametrize("strategy", ["flora", "fedex", "frlora"])
@pytest.mark.slow
def test_the_exported_folder_computes_what_the_run_arrived_at(
    tiny_federation: Any, tmp_path: Path, strategy: str
) -> None:
    sites = {"data.sites": MIXED} if strategy == "flora" else {}
    config = tiny_federation.config(strategy=strategy, rounds=2, **sites)
    run = tiny_federation.run(config, tmp_path / "run")
    state = load_last(tmp_path / "run" / "checkpoints").state
    assert all(offset_a(pair) in state for pair in state.spec.pairs)

    model = resident(config)
    examples = list(model.task.encode([f"heart {k} lung" for k in range(8)], [0] * 8, model.base.processor))
    batch = model.task.collate(examples, model.base.processor)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    model.adapter.write(state)
    base = model.task.load(config.model, config.task, config.seed).model
    plain: Any = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    with torch.no_grad():
        want, got = model.adapter.model(**inputs).logits, plain(**inputs).logits
    assert float((got - want).abs().max()) < 1e-5
    ranks = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(ranks.values()) == sorted(4 + len(state[offset_a(pair)]) for pair in state.spec.pairs)
    assert run["status"] == "finished"


def test_a_run_leaves_the_base_model_in_memory_as_it_was(tiny_federation: Any, tmp_path: Path) -> None:
    """All runs of a process share it, and its fingerprint was taken when it was loaded."""
    forget_all()
    fresh = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "fresh")
    tiny_federation.run(tiny_federation.config(strategy="flora", rounds=2), tmp_path / "flora")
    model = resident(tiny_federation.config())
    assert model.adapter._offset._applied, "the run before must have changed it"
    again = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "again")
    assert again["digest"] == fresh["digest"]
    assert again["loss"] == fresh["loss"]
    loaded = model.task.load(tiny_federation.config().model, tiny_federation.config().task, 3).model
    held = {name.replace(".base_layer", ""): p for name, p in model.base.model.named_parameters()}
    frozen = {name: p for name, p in loaded.named_parameters() if "classifier" not in name}
    assert frozen and frozen.keys() <= held.keys()
    assert [name for name in frozen if not torch.equal(held[name], frozen[name])] == []


@pytest.mark.slow
def test_a_site_of_a_lower_rank_evaluates_the_whole_change(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(strategy="flora", rounds=2, **{"data.sites": MIXED})
    tiny_federation.run(config, tmp_path / "run")
    state = load_last(tmp_path / "run" / "checkpoints").state
    model = resident(config)
    examples = list(model.task.encode([f"liver {k}" for k in range(6)], [2] * 6, model.base.processor))
    whole = evaluate(model, state, examples, config)
    low = config.model_copy(update={"method": config.method.model_copy(update={"rank": 1})})
    spec = state.spec.with_rank(1)
    part = AdapterState(spec, {t.name: state[t.name][tuple(slice(n) for n in t.shape)] for t in spec.tensors})
    np.testing.assert_allclose(evaluate(resident(low), part, examples, config).loss_sum, whole.loss_sum, rtol=1e-5)


@pytest.mark.slow
def test_frlora_runs_under_central_privacy(tiny_federation: Any, tmp_path: Path) -> None:
    """It needs nothing but sums of the updates; what it makes of them is post-processing."""
    config = tiny_federation.config(strategy="frlora", rounds=2, **{"central.enabled": True})
    run = tiny_federation.run(config, tmp_path / "run")
    assert run["status"] == "finished" and run["central"]["epsilon"] > 0
    state = load_last(tmp_path / "run" / "checkpoints").state
    assert all(np.isfinite(state.delta(pair)).all() and state.delta(pair).any() for pair in state.spec.pairs)
