"""Local training, held against loops written out by hand, and against what it must never do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, ResNetConfig, ResNetModel, ViTImageProcessor

from fedgraft.client import trainer
from fedgraft.client.evaluation import evaluate
from fedgraft.client.resident import Resident, device_of, forget_all, resident
from fedgraft.client.trainer import Trained, by_length, learning_rate_factor, train
from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig, TrainConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy.correlated import CorrelatedNoise
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import Sample, shuffled_batches

RECORDS = 40


@dataclass(frozen=True)
class Site:
    """Forty of the tiny federation's records, as a site holds them, and what trains on them."""

    federation: Any

    def config(self, **changes: Any) -> RunConfig:
        return self.federation.config(**{"train.local_steps": 3, "train.batch_size": 16, **changes})  # type: ignore[no-any-return]

    def model(self, config: RunConfig) -> Resident:
        return resident(config)

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.federation.rows[:RECORDS]]

    @property
    def labels(self) -> list[int]:
        names = ("class-zebra", "class-yak", "class-walrus")
        return [names.index(row["label"]) for row in self.federation.rows[:RECORDS]]

    def examples(self, model: Resident) -> Any:
        return model.task.encode(self.texts, self.labels, model.base.processor)

    def start(self, config: RunConfig) -> AdapterState:
        """A fresh adapter whose B is not zero, so that A has a gradient too."""
        model = self.model(config)
        draw = np.random.default_rng(4)
        first = fresh(config)
        model.adapter.adopt(model.adapter.spec.with_policy("share", lambda t: True))
        return first.map(lambda array: array + draw.normal(0, 0.05, array.shape).astype(array.dtype))

    def train(
        self,
        config: RunConfig,
        *,
        round: int = 1,
        plan: PrivacyPlan | None = None,
        start: AdapterState | None = None,
        **more: Any,
    ) -> Trained:
        model = self.model(config)
        groups = more.pop("groups", [np.array([i]) for i in range(RECORDS)])
        return train(
            model,
            start or self.start(config),
            more.pop("examples", None) or self.examples(model),
            groups,
            config,
            site="north",
            round=round,
            plan=plan,
            **more,
        )


_FRESH: dict[str, AdapterState] = {}


def fresh(config: RunConfig) -> AdapterState:
    """The adapter as it is drawn, whatever was trained since."""
    key = f"{config.model}{config.method.to_json()}{config.seed}"
    if key not in _FRESH:
        forget_all()
        _FRESH[key] = resident(config).adapter.read()
    return _FRESH[key]


@pytest.fixture(scope="module")
def site(tiny_federation: Any) -> Site:
    return Site(tiny_federation)


def plan(config: RunConfig, **changes: Any) -> PrivacyPlan:
    """A plan of repeatable noise over the forty records."""
    values: dict[str, Any] = {
        "unit": "record",
        "units": RECORDS,
        "expected_batch": config.train.batch_size,
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "steps": config.train.local_steps,
        "epsilon": 50.0,
        "delta": 1e-3,
        "seeded_noise_not_private": True,
    }
    return PrivacyPlan(**{**values, **changes})


def gap(one: AdapterState, other: AdapterState) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# The learning rate


@pytest.mark.parametrize(
    ("schedule", "form"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1.0 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_schedules_are_their_closed_forms(schedule: Any, form: Callable[[float], float], warmup: int) -> None:
    settings, total = TrainConfig(schedule=schedule, warmup_steps=warmup), 24
    for step in range(total):
        want = (step + 1) / warmup if step < warmup else form((step - warmup) / (total - warmup))
        assert learning_rate_factor(settings, step, total) == pytest.approx(want, abs=1e-15)
        assert learning_rate_factor(settings, step, total) > 0, "a step without any learning rate is a step for nothing"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_as_long_as_the_run_only_warms_up(schedule: Any) -> None:
    settings = TrainConfig(schedule=schedule, warmup_steps=10)
    assert [learning_rate_factor(settings, step, 10) for step in range(10)] == [n / 10 for n in range(1, 11)]
    assert math.isfinite(learning_rate_factor(settings, 10, 10))


def test_the_schedule_runs_over_all_rounds(site: Site) -> None:
    """With every record in every batch the gradient is the same in each round, so the way is the learning rate."""
    changes = {"train.local_steps": 1, "train.batch_size": RECORDS, "train.momentum": 0.0, "rounds": 4}
    config = site.config(**changes, **{"train.schedule": "linear"})
    start = site.start(config)
    ways = [(site.train(config, round=number, start=start).state - start).norm() for number in (1, 2, 3, 4)]
    assert np.array(ways) / ways[0] == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-4)


# A twin written out by hand


def twin(site: Site, config: RunConfig, start: AdapterState, round: int, optimizer: str) -> AdapterState:
    """The round as a textbook says it: own batching, own padding, own cross-entropy, own update rules, in float32."""
    forget_all()
    model = site.model(config).adapter.model
    parameters = {name: p for name, p in model.named_parameters() if name in start}
    for name, parameter in parameters.items():
        parameter.data = torch.from_numpy(start[name].copy())
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    settings = config.train
    stream = RandomStream.seeded_not_private(config.seed, "north", round)
    stream.words(1)
    batches = shuffled_batches(RECORDS, settings.batch_size, stream)
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    model.eval()
    for step in range(1, settings.local_steps + 1):
        chosen = [int(i) for i in next(batches)]
        batch = tokenizer([site.texts[i] for i in chosen], return_tensors="pt", padding=True)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits, torch.tensor([site.labels[i] for i in chosen]))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rate = settings.lr * learning_rate_factor(
            settings, (round - 1) * settings.local_steps + step - 1, config.total_steps
        )
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if optimizer == "sgd":
                    gradient = gradient + settings.weight_decay * parameter
                    first[name] = gradient if step == 1 else settings.momentum * first[name] + gradient
                    parameter -= rate * first[name]
                else:
                    parameter -= rate * settings.weight_decay * parameter
                    first[name] = 0.9 * first[name] + 0.1 * gradient
                    second[name] = 0.999 * second[name] + 0.001 * gradient**2
                    scale = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                    parameter -= rate * first[name] / (1 - 0.9**step) / scale
    result = AdapterState(start.spec, {name: p.detach().numpy().copy() for name, p in parameters.items()})
    forget_all()
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {"train.momentum": 0.0},
        {"train.momentum": 0.9, "train.weight_decay": 0.01},
        {"train.optimizer": "adamw", "train.lr": 1e-3},
        {"train.optimizer": "adamw", "train.lr": 1e-3, "train.weight_decay": 0.1, "train.schedule": "cosine"},
    ],
    ids=["sgd", "sgd with momentum and decay", "adamw", "adamw with decay and a schedule"],
)
@pytest.mark.parametrize("round", [1, 2])
def test_a_round_is_what_a_textbook_loop_gives(site: Site, changes: dict[str, Any], round: int) -> None:
    config = site.config(**changes)
    start = site.start(config)
    want = twin(site, config, start, round, config.train.optimizer)
    result = site.train(config, round=round, start=start)
    assert gap(result.state, want) <= 1e-6
    assert gap(result.state, start) > 1e-3, "nothing moved, so nothing was compared"


def test_the_gradient_of_the_batch_is_clipped_where_asked(site: Site) -> None:
    changes = {"train.local_steps": 1, "train.momentum": 0.0, "train.lr": 1.0}
    config = site.config(**changes)
    start = site.start(config)
    free = (site.train(config, start=start).state - start).norm()
    bound = free / 3
    clipped = site.train(site.config(**changes, **{"train.max_grad_norm": bound}), start=start).state - start
    assert clipped.norm() == pytest.approx(bound, rel=1e-4)


# What must not change the result


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "change", [{"train.micro_batch": 5}, {"train.micro_batch": 1}, {"train.gradient_checkpointing": True}]
)
def test_how_a_batch_is_computed_does_not_change_the_result(site: Site, private: bool, change: dict[str, Any]) -> None:
    config, other = site.config(), site.config(**change)
    start = site.start(config)
    promise = plan(config) if private else None
    one = site.train(config, start=start, plan=promise)
    two = site.train(other, start=start, plan=promise)
    assert gap(one.state, two.state) <= 1e-6
    if not private:
        assert one.loss == pytest.approx(two.loss, abs=1e-6)
    if "train.gradient_checkpointing" in change:
        model = site.model(other).adapter.model
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()), (
            "left switched on"
        )
        assert not any(module.training for module in model.modules())


def test_what_ran_before_does_not_change_the_result(site: Site) -> None:
    config = site.config()
    start = site.start(config)
    alone = site.train(config, start=start)
    site.train(config, round=2)
    torch.manual_seed(99)
    evaluate(site.model(config), alone.state, site.examples(site.model(config)), config)
    before = torch.get_rng_state()
    again = site.train(config, start=start)
    assert again.state.digest == alone.state.digest
    assert torch.equal(torch.get_rng_state(), before), "training drew from the generator of whoever called it"


def test_sites_and_rounds_see_their_own_batches(site: Site) -> None:
    config = site.config()
    start = site.start(config)
    model = site.model(config)
    groups = [np.array([i]) for i in range(RECORDS)]

    def digest(name: str, round: int) -> str:
        return train(model, start, site.examples(model), groups, config, site=name, round=round, plan=None).state.digest

    assert len({digest("north", 1), digest("east", 1), digest("north", 2)}) == 3


def test_the_loss_is_the_mean_over_the_steps_and_told_step_by_step(site: Site) -> None:
    seen: list[tuple[int, float | None]] = []
    result = site.train(site.config(), on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 2, 3]
    losses = [loss for _, loss in seen if loss is not None]
    assert result.loss == pytest.approx(sum(losses) / 3)
    assert result.steps == 3


# Dropout and normalisation


def test_dropout_is_off_unless_asked_for(site: Site, tmp_path: Path) -> None:
    plain = site.config()
    start = site.start(plain)
    # The twin above runs the model in evaluation mode, so that the default equals it shows that nothing is dropped.
    digests = {site.train(plain, start=start).state.digest}
    for change in ({"method.dropout": 0.3}, {"train.base_dropout": True}):
        config = site.config(**change)
        moved = AdapterState(fresh(config).spec, dict(start))
        one, two = (site.train(config, start=moved).state.digest for _ in range(2))
        assert one == two, "dropout draws from the run's seed"
        digests.add(one)
        assert not any(module.training for module in site.model(config).adapter.model.modules())
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["vera", "miss"])
def test_the_dropout_of_every_tuner_is_switched_on(site: Site, name: str) -> None:
    plain, dropped = (site.config(**{"method.name": name, "method.dropout": rate}) for rate in (0.0, 0.3))
    start = site.start(plain)
    moved = AdapterState(fresh(dropped).spec, dict(start))
    assert site.train(plain, start=start).state.digest != site.train(dropped, start=moved).state.digest


def test_frozen_normalisation_over_the_batch_never_moves(tmp_path: Path) -> None:
    """Batch statistics in a running mean would leave the site without noise."""
    from PIL import Image

    from fedgraft.core.config import parse_config

    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")).save_pretrained(
        tmp_path / "resnet"
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "resnet")
    config = parse_config(
        {
            "model": str(tmp_path / "resnet"),
            "method": {"rank": 2, "target_modules": ["convolution"]},
            "task": {"name": "image-classification", "labels": ["dark", "light"]},
            "train": {"local_steps": 2, "batch_size": 8, "base_dropout": True, "device": "cpu"},
            "privacy": {"enabled": False},
            "data": {"path": "x", "sites": ["north"]},
        }
    )
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (16, 16, 3)).astype(np.uint8)) for _ in range(16)]
    model = resident(config)
    norms = [m for m in model.adapter.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 3
    # In training mode these would move: the test can fail.
    norms[0].train()
    norms[0](torch.randn(4, norms[0].num_features, 2, 2))
    norms[0].eval()
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    assert float(before[0][0].abs().max()) > 0
    start = model.adapter.read()
    examples = model.task.encode(images, [i % 2 for i in range(16)], model.base.processor)
    groups = [np.array([i]) for i in range(16)]
    result = train(model, start, examples, groups, config, site="north", round=1, plan=None)
    assert gap(result.state, start) > 0
    for module, (mean, variance, count) in zip(norms, before, strict=True):
        assert torch.equal(module.running_mean, mean)
        assert torch.equal(module.running_var, variance)
        assert torch.equal(module.num_batches_tracked, count)
        assert not module.training
    forget_all()


def test_the_base_model_stays_as_it_is_to_the_bit(site: Site) -> None:
    config = site.config()
    model = site.model(config).adapter

    def frozen() -> str:
        total = hashlib.sha256()
        for name, tensor in sorted(model.model.state_dict().items()):
            if name not in model.spec.by_name:
                total.update(name.encode() + tensor.numpy().tobytes())
        return total.hexdigest()

    before = frozen()
    for promise in (None, plan(config)):
        site.train(site.config(**{"train.base_dropout": True}), plan=promise)
        site.train(config, plan=promise)
    assert frozen() == before
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_a_frozen_factor_stays_as_it_is_to_the_bit(site: Site) -> None:
    config = site.config()
    start = site.start(config)
    spec = start.spec.with_policy("freeze", lambda t: t.role == "lora_A")
    frozen = set(spec.select("freeze"))
    assert len(frozen) == 4
    for promise in (None, plan(config)):
        result = site.train(config, start=AdapterState(spec, dict(start)), plan=promise)
        for name in start:
            assert np.array_equal(result.state[name], start[name]) == (name in frozen), name
    # And the next run without a frozen factor trains it again.
    assert not np.array_equal(site.train(config, start=start).state[min(frozen)], start[min(frozen)])


# Precision


@pytest.mark.parametrize("private", [False, True])
def test_half_precision_gives_nearly_the_same(site: Site, private: bool) -> None:
    config, half = site.config(), site.config(**{"train.precision": "bf16"})
    start = site.start(config)
    promise = plan(config) if private else None
    exact, rough = (site.train(c, start=start, plan=promise).state for c in (config, half))
    way = (exact - start).norm()
    assert 0 < (exact - rough).norm() < 0.1 * way
    assert {array.dtype.name for array in rough.values()} == {"float32"}


def test_sixteen_bit_floats_scale_their_loss_without_privacy_and_are_refused_with_it(site: Site) -> None:
    config, half = site.config(), site.config(**{"train.precision": "fp16"})
    start = site.start(config)
    exact, rough = (site.train(c, start=start).state for c in (config, half))
    assert 0 < (exact - rough).norm() < 0.1 * (exact - start).norm()
    with pytest.raises(UserError, match=r"^train\.precision fp16 needs loss scaling.*; use bf16 or fp32$"):
        site.train(half, plan=plan(half))


def test_training_that_diverges_is_stopped_and_names_the_tensor(site: Site) -> None:
    for promise in (None, plan(site.config(), clip=1e4)):
        config = site.config(**{"train.lr": 1e38})
        with pytest.raises(UserError) as caught:
            site.train(config, round=2, plan=promise)
        text = str(caught.value)
        assert text.startswith("training diverged in round 2: tensor base_model.model.")
        assert text.endswith("holds NaN or infinity; lower train.lr")
    # The next round is not harmed by what is left in the model.
    assert np.isfinite(site.train(site.config()).loss or np.nan)


# Privacy


class Spy:
    """Stands in for the Poisson sampler: gives the batches it is told to."""

    def __init__(self, *batches: Sequence[int]) -> None:
        self.left = [np.array(batch, dtype=np.int64) for batch in batches]

    def __call__(self, groups: Any, rate: float, stream: RandomStream, **settings: Any) -> Sample:
        records = self.left.pop(0)
        return Sample(records, np.arange(len(records)))


def test_an_empty_sample_is_a_step_of_noise_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size says what the noise is: every number of every tensor moves by sigma C / B, the head's too."""
    config = site.config(**{"train.local_steps": 1, "train.momentum": 0.0, "train.lr": 1.0})
    start = site.start(config)
    promise = plan(config, clip=0.3, noise_multiplier=2.0)
    monkeypatch.setattr(trainer, "draw", Spy([]))
    result = site.train(config, start=start, plan=promise)
    assert result.steps == 1
    unit = 2.0 * 0.3 / config.train.batch_size
    assert len(start) == 10
    for name in start:
        z = ((result.state[name] - start[name]) / unit).ravel().astype(np.float64)
        # Five standard errors of mean and variance of z.size standard normals.
        assert abs(z.mean()) < 5 / math.sqrt(z.size), name
        assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / z.size), name


def test_empty_samples_of_a_small_rate_are_taken_in_stride(site: Site) -> None:
    config = site.config(**{"train.local_steps": 40, "train.batch_size": 1, "train.lr": 1e-3})
    promise = plan(config, expected_batch=1, steps=40)
    sizes: list[int] = []
    plain = trainer.draw

    def counting(*args: Any, **settings: Any) -> Sample:
        sample = plain(*args, **settings)
        sizes.append(len(sample.records))
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw", counting)
        result = site.train(config, plan=promise)
    assert result.steps == len(sizes) == 40
    assert 5 < sizes.count(0) < 30


def test_one_record_moves_the_update_by_no_more_than_the_clip(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all trainables together, head included: with one sum unclipped the bound would break a hundredfold."""
    clip = 0.01
    config = site.config(**{"train.local_steps": 1, "train.momentum": 0.0, "train.lr": 1.0, "train.batch_size": 1})
    start = site.start(config)
    promise = plan(config, clip=clip, expected_batch=1)
    monkeypatch.setattr(trainer, "draw", Spy([0, 1, 2], [0, 1, 2, 7], []))
    without, with_it, nothing = (site.train(config, start=start, plan=promise).state for _ in range(3))
    assert (with_it - without).norm() == pytest.approx(clip, rel=1e-3)
    head = [name for name in start if "classifier" in name]
    assert len(head) == 2
    moved = (with_it - without).only(head).norm()
    assert 0 < moved < clip
    # Three records of norm C at most beside the noise, which is the same in all of them.
    assert (without - nothing).norm() <= 3 * clip * (1 + 1e-3)


def test_without_a_plan_one_record_moves_the_update_by_far_more(site: Site) -> None:
    """What the test before guards against is there: raw gradients are a hundred times its clip."""
    config = site.config(**{"train.local_steps": 1, "train.momentum": 0.0, "train.lr": 1.0, "train.batch_size": 1})
    start = site.start(config)
    update = site.train(config, start=start).state - start
    assert update.norm() > 1.0
    assert update.only([name for name in start if "classifier" in name]).norm() > 0.5


@pytest.mark.parametrize("most", [1, 3])
def test_a_patient_gives_no_more_records_a_step_than_it_may(
    site: Site, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    config = site.config()
    groups = [np.arange(start, start + 4) for start in range(0, RECORDS, 4)]
    seen: list[int] = []
    plain = trainer.by_unit

    def spying(examples: Any, sample: Sample, size: int) -> Any:
        patients = sample.records // 4
        assert set(np.bincount(patients).tolist()) <= {0, most}
        # Records are numbered by their patient, whichever number that is.
        assert len({(p, u) for p, u in zip(patients, sample.units, strict=True)}) == len(set(patients.tolist()))
        seen.extend(patients.tolist())
        return plain(examples, sample, size)

    monkeypatch.setattr(trainer, "by_unit", spying)
    promise = plan(config, unit="patient", units=10, expected_batch=8, records_per_patient=most)
    site.train(config, plan=promise, groups=groups)
    assert len(seen) > 10 * most


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_the_gradients_of_a_patient_are_joined_and_clipped_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, gradient: str
) -> None:
    """Against plain backward passes, record by record: patients of 1, 3 and 2 records, in one batch and in several."""
    clip, groups = 0.05, [np.array([0]), np.array([1, 2, 3]), np.array([4, 5])]
    sample = Sample(np.arange(6), np.array([0, 1, 1, 1, 2, 2]))
    monkeypatch.setattr(trainer, "draw", lambda *args, **settings: sample)
    monkeypatch.setattr(RandomStream, "normal_like", lambda self, tensor: torch.zeros_like(tensor))
    updates = []
    for micro in (3, 64):
        config = site.config(
            **{
                "train.local_steps": 1,
                "train.momentum": 0.0,
                "train.lr": 1.0,
                "train.batch_size": 3,
                "train.micro_batch": micro,
            }
        )
        start = site.start(config)
        promise = plan(
            config,
            unit="patient",
            units=10,
            expected_batch=3,
            clip=clip,
            records_per_patient=3,
            patient_gradient=gradient,
        )
        updates.append(site.train(config, start=start, plan=promise, groups=groups).state - start)
    assert gap(*updates) < 1e-6
    model = site.model(config)
    model.adapter.write(start)
    trainables, examples = model.adapter.trainables(), site.examples(model)
    want = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainables.items()}
    for group in groups:
        losses = [
            model.task.losses(model.adapter.model, model.task.collate([examples[i]], model.base.processor))
            for i in group
        ]
        whole = torch.cat(losses).mean() if gradient == "mean" else torch.cat(losses).sum()
        own = [g.double() for g in torch.autograd.grad(whole, list(trainables.values()))]
        norm = math.sqrt(sum(float((g**2).sum()) for g in own))
        assert norm > clip
        for name, g in zip(trainables, own, strict=True):
            want[name] -= g * clip / norm / 3
    for name, update in updates[0].items():
        assert np.allclose(update, want[name].numpy(), atol=1e-6), name


def test_batches_keep_the_records_of_a_unit_together() -> None:
    examples = [{"length": n, "own": n} for n in (9, 2, 5, 1, 7, 3)]
    sample = Sample(np.arange(6), np.array([0, 1, 1, 2, 2, 3]))
    batches = [([e["own"] for e in batch], units.tolist()) for batch, units in trainer.by_unit(examples, sample, 3)]
    assert batches == [([3, 2, 5], [0, 1, 1]), ([1, 7, 9], [0, 0, 1])]
    assert list(trainer.by_unit(examples, Sample(np.empty(0, int), np.empty(0, int)), 3)) == []


def test_a_private_round_tells_no_loss(site: Site) -> None:
    seen: list[float | None] = []
    result = site.train(site.config(), plan=plan(site.config()), on_step=lambda step, loss: seen.append(loss))
    assert result.loss is None
    assert seen == [None, None, None]


def test_noise_comes_from_the_operating_system_unless_said_otherwise(site: Site) -> None:
    config = site.config(**{"train.local_steps": 1})
    start = site.start(config)
    private = plan(config, seeded_noise_not_private=False)
    digests = {site.train(config, start=start, plan=private).state.digest for _ in range(3)}
    assert len(digests) == 3
    assert len({site.train(config, start=start, plan=plan(config)).state.digest for _ in range(3)}) == 1
    # Two sites of one seed share no noise.
    assert replace(private, seeded_noise_not_private=True) == plan(config)


# Small parts


def test_batches_by_length_hold_everything_once_shortest_first() -> None:
    examples = [{"length": n} for n in (5, 1, 4, 2, 3)]
    batches = list(by_length(examples, [4, 0, 2, 1], 2))
    assert [[e["length"] for e in batch] for batch in batches] == [[1, 3], [4, 5]]
    assert list(by_length(examples, [], 2)) == []


def test_counts_of_an_evaluation_are_those_of_a_plain_loop(site: Site) -> None:
    config = site.config(**{"evaluate.batch_size": 7})
    model = site.model(config)
    state = site.train(config).state
    scores = evaluate(model, state, site.examples(model), config)
    counts = scores.exact()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    right: list[bool] = []
    loss = 0.0
    with torch.no_grad():
        for text, label in zip(site.texts, site.labels, strict=True):
            logits = model.adapter.model(**tokenizer([text], return_tensors="pt")).logits
            right.append(int(logits.argmax()) == label)
            loss += float(F.cross_entropy(logits, torch.tensor([label])))
    assert counts["examples"] == RECORDS
    assert counts["correct"] == sum(right)
    # Each record's own score stands at its own place, whatever order the batches took.
    assert scores.correct.astype(bool).tolist() == right
    assert counts["loss_sum"] == pytest.approx(loss, rel=1e-5)
    assert evaluate(model, state, [], config).exact() == {"examples": 0.0, "correct": 0.0, "loss_sum": 0.0}


@pytest.mark.parametrize("name", ["cuda:7", "mps", "tpu", "nonsense", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    if (name.startswith("cuda") and torch.cuda.is_available()) or (name == "mps" and torch.backends.mps.is_available()):
        pytest.skip(f"there is a {name}")
    with pytest.raises(UserError) as caught:
        device_of(name)
    assert str(caught.value) == f"train.device `{name}` is not there; use cpu, or auto to take what there is"


def test_a_device_is_found() -> None:
    assert device_of("cpu").type == "cpu"
    assert device_of("auto").type in ("cpu", "cuda", "mps")


def test_the_model_stays_in_memory_and_two_are_kept(site: Site) -> None:
    forget_all()
    one = site.model(site.config())
    assert site.model(site.config(rounds=9, **{"train.lr": 2.0})) is one, "what does not change the model reloads it"
    two = site.model(site.config(**{"method.rank": 2}))
    assert site.model(site.config()) is one
    site.model(site.config(**{"method.rank": 3}))
    assert site.model(site.config()) is one
    assert site.model(site.config(**{"method.rank": 2})) is not two
    forget_all()
    assert site.model(site.config()) is not one


# Turns, correlated noise, a bound that adapts


def _watch_draws(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    seen: list[list[int]] = []
    plain = trainer.draw

    def watching(*args: Any, **settings: Any) -> Sample:
        sample = plain(*args, **settings)
        seen.append(sample.records.tolist())
        return sample

    monkeypatch.setattr(trainer, "draw", watching)
    return seen


def test_units_in_turn_all_come_once_an_epoch_at_their_own_step(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site.config(**{"train.local_steps": 10, "train.batch_size": 8, "train.lr": 1e-3})
    keys = [f"patient {i}".encode() for i in range(RECORDS)]
    promise = plan(config, sampler="cyclic", steps=10, expected_batch=8, epsilon=200.0)
    assert promise.slots == 5
    seen = _watch_draws(monkeypatch)
    site.train(config, plan=promise, keys=keys)
    for epoch in (seen[:5], seen[5:]):
        assert sorted(record for step in epoch for record in step) == list(range(RECORDS))
    assert seen[:5] == seen[5:]
    all_of_them = seen[:]
    # A site without the first ten deals the others exactly as before.
    seen.clear()
    fewer = plan(config, sampler="cyclic", steps=10, expected_batch=6, units=30, epsilon=200.0)
    assert fewer.slots == 5
    site.train(config, plan=fewer, keys=keys[10:], groups=[np.array([i]) for i in range(10, RECORDS)])
    assert seen == [[record for record in step if record >= 10] for step in all_of_them]
    # A later round goes on where the one before ended.
    seen.clear()
    later = plan(config, sampler="cyclic", steps=10, expected_batch=8, epsilon=200.0, first_step=3)
    site.train(config, plan=later, keys=keys)
    assert seen == [*all_of_them[3:], *all_of_them[:3]]
    with pytest.raises(ValueError, match="3 keys for 40 units that come in turn"):
        site.train(config, plan=promise, keys=keys[:3])


def test_a_sample_beyond_the_most_is_cut_down(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site.config(**{"train.local_steps": 12, "train.batch_size": 8, "train.lr": 1e-3})
    promise = plan(config, sampler="truncated_poisson", max_batch=9, steps=12, expected_batch=8, epsilon=200.0)
    seen = _watch_draws(monkeypatch)
    site.train(config, plan=promise)
    sizes = [len(step) for step in seen]
    assert max(sizes) == 9 and sizes.count(9) >= 2


def test_correlated_noise_goes_on_from_round_to_round(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six empty steps in two rounds move the adapter by the rows of C^-1 z, each once, whatever process takes them."""
    config = site.config(**{"train.local_steps": 3, "train.batch_size": 8, "train.lr": 1.0, "train.momentum": 0.0})
    key, bands = bytes(range(32)), 4
    nobody = Sample(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    monkeypatch.setattr(trainer, "draw", lambda *args, **settings: nobody)
    values: dict[str, Any] = {"sampler": "cyclic", "bands": bands, "expected_batch": 8, "epsilon": 500.0, "clip": 0.5}
    keys = [str(i).encode() for i in range(RECORDS)]
    start = state = site.start(config)
    for first in (0, 3):
        promise = plan(config, **values, first_step=first)
        state = site.train(config, start=state, plan=promise, keys=keys, noise=promise.correlated(key)).state
    moved = np.concatenate([(state[name] - start[name]).ravel().astype(np.float64) for name in start])
    source = CorrelatedNoise(key, bands)
    like = torch.zeros(len(moved), dtype=torch.float64)
    rows = sum(source.at(step).normal_like(like) for step in range(6))
    assert isinstance(rows, torch.Tensor)
    assert np.allclose(moved, -(rows * 1.0 * 0.5 / 8).numpy(), atol=2e-6)


def test_a_bound_that_adapts_follows_the_norms_over_the_rounds(site: Site) -> None:
    config = site.config(**{"train.local_steps": 20, "train.lr": 1e-4, "train.batch_size": 32})
    start, clip = site.start(config), 1e-3
    promise = plan(config, expected_batch=32, steps=20, epsilon=500.0, clip=clip, clip_quantile=0.5, clip_rate=0.5)
    assert promise.gradient_noise > promise.noise_multiplier
    bounds = []
    for round in (1, 2, 3):
        result = site.train(config, start=start, round=round, plan=promise, clip=clip)
        assert result.clip is not None
        clip = result.clip
        bounds.append(clip)
    norms = _norms(site, config, start)
    assert bounds[0] > 5e-3
    assert 0.25 < float((norms <= bounds[-1]).mean()) < 0.75
    assert site.train(config, plan=plan(config)).clip is None


def _norms(site: Site, config: RunConfig, start: AdapterState) -> np.ndarray:
    model = site.model(config)
    model.adapter.write(start)
    trainables = list(model.adapter.trainables().values())
    norms = []
    for example in site.examples(model):
        loss = model.task.losses(model.adapter.model, model.task.collate([example], model.base.processor))[0]
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in torch.autograd.grad(loss, trainables))))
    return np.array(norms)


def test_a_batch_whose_rows_do_not_fit_comes_in_parts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site.config(**{"train.local_steps": 2})
    start = site.start(config)
    promise = plan(config)
    whole = site.train(config, start=start, plan=promise).state
    seen: list[int] = []
    plain = trainer.create_engine

    def small(*args: Any) -> Any:
        """Room for the gradients of five examples."""
        engine = plain(*args)
        engine.most_rows = 5
        expect = engine.expect
        engine.expect = lambda rows: (seen.append(rows), expect(rows))[1]  # type: ignore[method-assign]
        return engine

    parts = site.train(config, start=start, plan=promise, create=small).state
    assert max(seen) == 5 and len(seen) > 4
    assert gap(parts, whole) < 1e-5
