"""The tiny models are what tests take them for: every task loads them, and they see their input."""

from __future__ import annotations

import pytest
import torch

from fedgraft.core.config import TaskConfig
from fedgraft.core.tasks import create_task


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])
def test_a_tiny_classifier_tells_two_texts_apart(tiny_model, family):
    config = TaskConfig(labels=("a", "b", "c"))
    task = create_task(config)
    base = task.load(tiny_model(family), config, 0)
    batch = task.collate(task.encode(["acute fever", "chronic pain"], [0, 0], base.processor), base.processor)
    first, second = task.losses(base.model, batch)
    assert abs(float(first - second)) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tiny_language_model_tells_two_texts_apart(tiny_model, family):
    config = TaskConfig(name="causal-lm")
    task = create_task(config)
    base = task.load(tiny_model(family, "causal-lm"), config, 0)
    batch = task.collate(task.encode(["acute severe fever", "mild fever fever"], None, base.processor), base.processor)
    first, second = task.losses(base.model, batch)
    assert abs(float(first - second)) > 1e-3


def test_building_leaves_the_random_state_alone(tinymodels, tmp_path):
    before = torch.random.get_rng_state()
    tinymodels.build(tmp_path, "bert", "sequence-classification")
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_family_is_refused(tinymodels, tmp_path):
    with pytest.raises(ValueError, match="there are bert, roberta"):
        tinymodels.build(tmp_path, "cnn", "sequence-classification")
