from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client.composing.embeddings import (
    Profile,
    embed,
    noised_mean,
    plain_profile,
    private_profile,
    profile_event,
)
from fedgraft.client.composing.scoring import encode
from fedgraft.client.data import read_records
from fedgraft.client.resident import Resident, resident
from fedgraft.core.config import PrivacyConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.ledger import Ledger, Limit
from fedgraft.privacy.noise import RandomStream

PRINT = "ab" * 32


def rows(count: int = 40, width: int = 12, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, width)) + 0.5
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def alone(count: int) -> list[np.ndarray]:
    return [np.array([i]) for i in range(count)]


def test_a_vector_is_the_mean_of_the_bare_encoders_last_states_of_one_unpadded_text(tiny_federation: Any) -> None:
    config = tiny_federation.config()
    model = resident(config)
    records = read_records(tiny_federation.table, config).take(np.arange(12))
    examples = encode(model, records)
    model.adapter.write(model.adapter.read().map(lambda array: array + 0.5))
    got = embed(model, examples, config)
    bare = model.task.load(config.model, config.task, config.seed).model.bert
    for row, example in zip(got, examples, strict=True):
        ids = torch.tensor([example["ids"]])
        with torch.no_grad():
            mean = bare(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), [("t5", "sequence-classification"), ("vit", "image-classification")])
def test_other_families_have_vectors_too(lab: Any, family: str, task: str, tiny_federation: Any) -> None:
    config = tiny_federation.config()
    adapter = lab.attach(family, task, "lora")
    model = Resident(lab.base(family, task), lab.task(task), adapter, torch.device("cpu"))
    found = embed(model, lab.records(family, task, lab.lengths), config)
    assert found.shape == (len(lab.lengths), 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-12)
    assert np.linalg.norm(found[0] - found[1]) > 0.01


def test_one_unit_moves_the_sum_by_no_more_than_one() -> None:
    """The sensitivity that the accounting stands on, whatever the unit's records hold."""
    event = Event(1e-12, 1.0, 1)
    for seed in range(20):
        held = rows(seed=seed)
        worst = np.concatenate([held, 1e6 * rows(3, seed=seed + 100), np.full((1, 12), np.nan)])
        groups = alone(len(held))
        stream = [RandomStream.seeded_not_private("same", seed) for _ in range(4)]
        without = noised_mean(worst, groups, event, stream[0]) * len(groups)
        for index, more in enumerate(([40, 41, 42], [40], [43])):
            with_it = noised_mean(worst, [*groups, np.array(more)], event, stream[1 + index]) * (len(groups) + 1)
            assert np.linalg.norm(with_it - without) <= 1.0 + 1e-9


def test_a_patients_records_count_as_their_mean() -> None:
    held = rows(6)
    groups = [np.array([0, 1, 2]), np.array([3]), np.array([4, 5])]
    got = noised_mean(held, groups, Event(1e-12, 1.0, 1), RandomStream.seeded_not_private("a"))
    want = (held[:3].mean(0) + held[3] + held[4:].mean(0)) / 3
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_noise_and_sampling_are_those_of_the_event() -> None:
    held, event = rows(50), Event(2.0, 0.4, 1)
    stream = RandomStream.seeded_not_private("noise")
    draws = np.stack([noised_mean(held, alone(50), event, stream) for _ in range(3000)]) * (0.4 * 50)
    total = held.sum(0)
    np.testing.assert_allclose(draws.mean(0), 0.4 * total, atol=6 * 3.0 / math.sqrt(3000))
    want = 2.0**2 + 0.4 * 0.6 * np.sum(held**2, axis=0)
    np.testing.assert_allclose(draws.var(0), want, rtol=6 * math.sqrt(2 / 3000))


def test_the_noise_keeps_the_budget_together_with_what_was_spent() -> None:
    privacy = PrivacyConfig(epsilon=3.0, delta=1e-4)
    spent = (Event(1.2, 0.1, 20),)
    for texts in (0, 100):
        event = profile_event(500, privacy, spent, texts)
        assert epsilon((*spent, event), 1e-4) <= 3.0
        assert epsilon((*spent, replace(event, noise_multiplier=event.noise_multiplier * 0.97)), 1e-4) > 3.0
    assert profile_event(500, privacy, spent, 100).sampling_rate == 0.2
    assert profile_event(50, privacy, spent, 100).sampling_rate == 1.0


def test_a_profile_is_paid_for_before_it_is_made(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**{"privacy.epsilon": 1.0})
    ledger = Ledger(tmp_path, PRINT, unit="patient")
    held = rows(300)
    profile = private_profile(held, alone(300), config, PRINT, ledger)
    (entry,) = ledger.entries()
    assert (entry.outcome, entry.part, entry.steps) == ("released", "train", 1)
    assert profile.epsilon == pytest.approx(ledger.total(1e-3, ""), rel=1e-9)
    assert 0.9 < profile.epsilon <= 1.0
    assert profile.noise == pytest.approx(entry.events[0].noise_multiplier / 300)
    error = profile.mean - held.mean(0)
    assert float(np.linalg.norm(error)) == pytest.approx(profile.noise * math.sqrt(12), rel=0.6)
    with pytest.raises(UserError, match="epsilon"):
        private_profile(held, alone(300), config, PRINT, ledger)
    tight = Limit(0.5, 1e-3, "the policy's max_epsilon 0.5")
    with pytest.raises(UserError, match="max_epsilon"):
        private_profile(held, alone(300), config, PRINT, Ledger(tmp_path / "other", PRINT), limits=(tight,))
    assert not Ledger(tmp_path / "other", PRINT).entries()


def test_without_a_promise_no_private_profile_is_made(tiny_federation: Any) -> None:
    with pytest.raises(UserError, match=r"needs privacy\.enabled"):
        private_profile(rows(), alone(40), tiny_federation.config(), PRINT, Ledger(None, PRINT))


def test_a_plain_profile_is_the_mean_of_some_texts() -> None:
    held = rows(250)
    profile = plain_profile(held, PRINT)
    assert (profile.units, profile.texts, profile.noise, profile.epsilon) == (250, 100, 0.0, 0.0)
    few = plain_profile(held[:30], PRINT)
    np.testing.assert_allclose(few.mean, held[:30].mean(0), rtol=1e-12)


def test_a_profile_travels_with_its_adapter(tmp_path: Path) -> None:
    profile = Profile(rows(1)[0], PRINT, 250, 100.0, 0.02, 1.5, 1e-5)
    profile.save(tmp_path)
    back = Profile.load(tmp_path, PRINT)
    np.testing.assert_array_equal(back.mean, profile.mean)
    assert replace(back, mean=profile.mean) == profile
    with pytest.raises(UserError, match="another base model"):
        Profile.load(tmp_path, "cd" * 32)
    (tmp_path / "embedding.json").write_text('{"mean": [1, "x"]}')
    with pytest.raises(UserError, match="cannot be read"):
        Profile.load(tmp_path)
    with pytest.raises(UserError, match="comes without an embedding"):
        Profile.load(tmp_path / "nowhere")
