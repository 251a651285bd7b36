from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client.composing.scoring import encode
from fedgraft.client.composing.statistics import fisher, grams
from fedgraft.client.data import read_records
from fedgraft.client.resident import Resident, resident
from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError


def lesson(tiny_federation: Any, count: int = 9, by: float = 0.3) -> tuple[Any, Resident, AdapterState, list[Any]]:
    config = tiny_federation.config(**{"evaluate.batch_size": 4})
    model = resident(config)
    draw = np.random.default_rng(1)
    state = model.adapter.read().map(lambda array: array + by * draw.standard_normal(array.shape))
    examples = encode(model, read_records(tiny_federation.table, config).take(np.arange(count)))
    return config, model, state, examples


def gradients(model: Resident, example: Any, label: int) -> dict[str, np.ndarray]:
    """d log p(label | x) of one record alone."""
    batch = model.task.collate([example], model.base.processor)
    logits = model.adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    trainables = model.adapter.trainables()
    found = torch.autograd.grad(torch.log_softmax(logits, 0)[label], list(trainables.values()))
    return {name: g.double().numpy() for name, g in zip(trainables, found, strict=True)}


def test_the_empirical_fisher_is_the_mean_of_each_records_squared_gradient(tiny_federation: Any) -> None:
    config, model, state, examples = lesson(tiny_federation)
    got = fisher(model, state, examples, config, labels="given")
    rows = [gradients(model, example, example["label"]) for example in examples]
    for name in state:
        want = np.mean([row[name] ** 2 for row in rows], axis=0)
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-9)
        assert got[name].max() > 0


def test_the_fisher_with_drawn_labels_tends_to_the_expectation_over_the_models_own(tiny_federation: Any) -> None:
    config, model, state, examples = lesson(tiny_federation, 3, 0.05)
    head = next(name for name in state if "classifier" in name and name.endswith("weight"))
    # A sure model hardly ever draws the answers whose gradients are large, and the mean would need many draws.
    state = AdapterState(state.spec, {**state, head: state[head] * np.float32(0.1)})
    model.adapter.write(state)
    want = np.zeros(state[head].shape)
    for example in examples:
        batch = model.task.collate([example], model.base.processor)
        with torch.no_grad():
            logits = model.adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        for label, chance in enumerate(torch.softmax(logits.double(), 0).tolist()):
            want += chance * gradients(model, example, label)[head] ** 2 / len(examples)
    got = np.mean([fisher(model, state, examples, config, seed=seed)[head] for seed in range(150)], axis=0)
    assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)
    again = [fisher(model, state, examples, config, seed=4) for _ in range(2)]
    assert again[0] == again[1]


def test_a_gram_matrix_is_the_mean_over_the_texts_own_tokens(tiny_federation: Any) -> None:
    config, model, state, examples = lesson(tiny_federation)
    got = grams(model, state, examples, config)
    modules = dict(model.adapter.model.named_modules())
    for pair in state.spec.pairs:
        inputs: list[np.ndarray] = []
        layer = modules[pair.a.partition(".lora_A.")[0]]
        hook = layer.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0][0].double().numpy()))
        with torch.no_grad():
            for example in examples:  # one at a time: nothing is padded
                model.task.losses(model.adapter.model, model.task.collate([example], model.base.processor))
        hook.remove()
        x = np.concatenate(inputs)
        assert len(x) == sum(example["length"] for example in examples)
        np.testing.assert_allclose(got[pair.a], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert set(got) == {pair.a for pair in state.spec.pairs}


def test_statistics_of_raw_records_are_refused_under_privacy(tiny_federation: Any) -> None:
    _, model, state, examples = lesson(tiny_federation)
    for statistic in (fisher, grams):
        with pytest.raises(UserError, match="the privacy budget does not pay for"):
            statistic(model, state, examples, tiny_federation.private())


def test_statistics_of_no_records_are_refused(tiny_federation: Any) -> None:
    config, model, state, _ = lesson(tiny_federation)
    for statistic in (fisher, grams):
        with pytest.raises(UserError, match="no records"):
            statistic(model, state, [], config)
