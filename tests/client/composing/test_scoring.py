from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client.composing.scoring import Scorer, encode, resident_for
from fedgraft.client.data import read_records
from fedgraft.client.resident import resident
from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError


def shaken(config: Any, seed: int = 0, by: float = 0.3) -> AdapterState:
    fresh = resident(config).adapter.read()
    draw = np.random.default_rng(seed)
    return fresh.map(lambda array: array + by * draw.standard_normal(array.shape))


def scorer(tiny_federation: Any) -> tuple[Any, Scorer]:
    config = tiny_federation.config()
    records = read_records(tiny_federation.table, config).take(np.arange(30))
    return config, Scorer(config, records)


def test_accuracy_and_loss_are_those_of_each_record_by_itself(tiny_federation: Any) -> None:
    config, few = scorer(tiny_federation)
    state = shaken(config)
    model = resident(config)
    records = read_records(tiny_federation.table, config).take(np.arange(30))
    model.adapter.write(state)
    losses, right = [], 0
    for example in encode(model, records):
        batch = model.task.collate([example], model.base.processor)
        with torch.no_grad():
            logits = model.adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0].double()
        label = int(batch["labels"][0])
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
        right += int(logits.argmax()) == label
    assert few.labels == 30
    assert few.accuracy(state) == pytest.approx(right / 30)
    assert few.loss(state) == pytest.approx(np.mean(losses), rel=1e-5)
    assert 0 < right < 30


def test_adapters_of_other_ranks_are_scored_as_well(tiny_federation: Any) -> None:
    config, few = scorer(tiny_federation)
    state = shaken(config)
    wide = state.spec.with_rank(6)
    tensors = dict(state)
    for pair, other in zip(state.spec.pairs, wide.pairs, strict=True):
        tensors[pair.a] = np.pad(state[pair.a], ((0, 2), (0, 0)))
        tensors[pair.b] = np.pad(state[pair.b] * np.float32(pair.scaling / other.scaling), ((0, 0), (0, 2)))
    assert few.loss(AdapterState(wide, tensors)) == pytest.approx(few.loss(state), rel=1e-5)


def test_an_adapter_that_is_not_of_the_model_is_refused(tiny_federation: Any) -> None:
    config = tiny_federation.config()
    spec = resident(config).adapter.spec
    scaled = replace(spec, pairs=tuple(replace(pair, scaling=9.0) for pair in spec.pairs))
    with pytest.raises(UserError, match="scales its factors by 9, method lora of rank 4 and alpha 8 by 2"):
        resident_for(config, scaled)
    lost = replace(spec, tensors=spec.tensors[:-1])
    with pytest.raises(UserError, match=r"tensor .*classifier.* is not in both"):
        resident_for(config, lost)
    odd = replace(spec, tensors=(*spec.tensors[:-1], replace(spec.tensors[-1], shape=(5,))))
    with pytest.raises(UserError, match=r"has shape \[5\], expected \[3\]"):
        resident_for(config, odd)


def test_without_records_nothing_is_scored(tiny_federation: Any) -> None:
    config = tiny_federation.config()
    with pytest.raises(UserError, match="no records"):
        Scorer(config, read_records(tiny_federation.table, config).take(np.arange(0)))
