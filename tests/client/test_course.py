"""A strategy's part of the training: which tensors train at a step, and in what direction, with privacy and without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client.resident import resident
from fedgraft.client.trainer import Trained, train
from fedgraft.core.adapter import AdapterSpec, AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.strategies import LocalRule, Training

RECORDS = 30
Train = Callable[..., Trained]


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.config(**{"train.local_steps": 4, "train.batch_size": 10, "train.momentum": 0.0})


@pytest.fixture
def start(config: RunConfig) -> AdapterState:
    """An adapter whose B is not zero, so that A has a gradient too."""
    draw = np.random.default_rng(4)
    fresh = resident(config).adapter.read()
    fresh = AdapterState(fresh.spec.bare, dict(fresh))
    return fresh.map(lambda array: array + draw.normal(0, 0.05, array.shape).astype(array.dtype))


@pytest.fixture
def at_site(config: RunConfig, start: AdapterState, tiny_federation: Any) -> Train:
    def run(rule: LocalRule | None, *, private: bool = False, expected: int = 10, **more: Any) -> Trained:
        model = resident(config)
        rows = tiny_federation.rows[:RECORDS]
        labels = [("class-zebra", "class-yak", "class-walrus").index(row["label"]) for row in rows]
        examples = model.task.encode([row["text"] for row in rows], labels, model.base.processor)
        plan = None
        if private:
            plan = PrivacyPlan(
                unit="record",
                units=RECORDS,
                expected_batch=expected,
                clip=1.0,
                noise_multiplier=1.0,
                steps=4,
                epsilon=50.0,
                delta=1e-3,
                seeded_noise_not_private=True,
            )
        groups = [np.array([i]) for i in range(RECORDS)]
        return train(model, start, examples, groups, config, site="north", round=1, plan=plan, rule=rule, **more)

    return run


ABOUT = Training("north", 1, 4, 0.1)


class Watching(LocalRule):
    """Leaves all as it is, and remembers what it was shown."""

    def __init__(self, memory: Mapping[str, AdapterState] | None = None) -> None:
        super().__init__(ABOUT, memory or {})
        self.seen: list[tuple[int, str]] = []
        self.starts: dict[str, torch.Tensor] = {}

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        assert gradient.shape == value.shape == start.shape
        self.seen.append((step, name))
        self.starts[name] = start
        if step == 0:
            assert torch.equal(value, start)
        return gradient


class InTurn(Watching):
    """A at even steps, B and the head at odd ones."""

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        return [name for name in spec.names if ("lora_A" in name) == (step % 2 == 0)]


class Downhill(LocalRule):
    """Pulls every tensor straight back to where it began."""

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        return 0 * gradient


@pytest.mark.parametrize("private", [False, True])
def test_a_rule_that_changes_nothing_changes_nothing(at_site: Train, start: AdapterState, private: bool) -> None:
    rule = Watching()
    assert at_site(rule, private=private).state == at_site(None, private=private).state
    assert set(rule.seen) == {(step, name) for step in range(4) for name in start}
    for name, began in rule.starts.items():
        np.testing.assert_array_equal(began.numpy(), start[name])


@pytest.mark.parametrize("private", [False, True])
def test_the_optimiser_takes_the_rules_direction(at_site: Train, start: AdapterState, private: bool) -> None:
    assert at_site(Downhill(ABOUT, {}), private=private).state == start


@pytest.mark.parametrize("private", [False, True])
def test_tensors_that_rest_stay_and_are_neither_clipped_nor_noised(
    at_site: Train, start: AdapterState, private: bool
) -> None:
    made: list[list[str]] = []

    def create(name: str, model: Any, trainables: Any, clip: float) -> Any:
        made.append(list(trainables))
        assert all(parameter.requires_grad for parameter in trainables.values())
        resting = [n for n, p in model.named_parameters() if n in start and n not in trainables and p.requires_grad]
        assert resting == []
        return create_engine(name, model, trainables, clip)

    rule = InTurn()
    trained = at_site(rule, private=private, **({"create": create} if private else {}))
    a = [name for name in start if "lora_A" in name]
    others = [name for name in start if "lora_A" not in name]
    assert made == ([a, others, a, others] if private else [])
    assert [name for step, name in rule.seen if step == 1] == others
    assert all(not np.array_equal(trained.state[name], start[name]) for name in start)
    # What rested is trainable again afterwards.
    again = at_site(None, private=private)
    assert all(not np.array_equal(again.state[name], start[name]) for name in start)


def test_a_private_step_of_some_tensors_clips_the_norm_of_these(at_site: Train, config: RunConfig) -> None:
    """A record alone in a step in which A alone trains adds a gradient of A of just the clipping norm."""
    sums: list[tuple[torch.Tensor, float]] = []

    class OnlyA(LocalRule):
        def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
            return [name for name in spec.names if "lora_A" in name]

    def create(name: str, model: Any, trainables: Any, clip: float) -> Any:
        engine = create_engine(name, model, trainables, 1e-3)  # so small that every record is clipped to it
        release = engine.release

        def released(noise: float, expected: float, stream: Any) -> None:
            over = engine.over
            release(0.0, 1.0, stream)
            sums.append((torch.cat([p.grad.reshape(-1) for p in trainables.values()]), float(over)))

        engine.release = released
        return engine

    at_site(OnlyA(ABOUT, {}), private=True, create=create, expected=1)
    alone = [float(total.norm()) for total, over in sums if over == 1]
    # Were the gradients of B and the head in the norm, A would be left with less.
    assert alone == pytest.approx([1e-3] * len(alone), rel=1e-5)
    assert alone


def test_a_rule_under_which_nothing_trains_is_refused(at_site: Train) -> None:
    class Idle(LocalRule):
        def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
            return []

    with pytest.raises(UserError, match="lets no tensor train at step 1"):
        at_site(Idle(ABOUT, {}))
