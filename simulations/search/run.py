"""The search: configurations are chosen, trained for some steps on public records, and measured on others of these."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...client.data import Records, read_records, split
from ...client.evaluation import evaluate
from ...client.resident import forget_all, resident
from ...client.trainer import train
from ...core.config import RunConfig, parse_config
from ...core.tasks import Example, create_task
from ..public import PUBLIC, public_config, require_public
from .choosing import chosen, drawn
from .results import Results, Trial, begun
from .space import Point, Space, space_of

#: Called before each trial with how many are done and what is tried, and at the end.
Told = Callable[[int, Point | None], None]


@dataclass(frozen=True)
class Ground:
    """What every trial stands on: the configuration without its method, the space, and the encoded records."""

    config: RunConfig
    space: Space
    train: list[Example]
    held_out: list[Example]
    digest: str


def ground_of(job: RunConfig, data: Path, steps: int) -> Ground:
    """Read and split the public records, and encode them with the model's own tokenizer or image processor."""
    require_public(job, data)
    config = public_config(job, steps, with_method=False)
    records = split(read_records(data, config), config, PUBLIC)
    task = create_task(config.task)
    base = task.load(config.model, config.task, config.seed)

    def encoded(part: Records) -> list[Example]:
        labels = None if part.labels is None else part.labels.tolist()
        return task.encode(part.inputs, labels, base.processor)

    digest = hashlib.sha256(f"{config.to_json()}{records.fingerprint}".encode()).hexdigest()
    return Ground(config, space_of(base.model), encoded(records.train), encoded(records.held_out), digest)


def accuracy_of(ground: Ground, point: Point) -> float:
    """Train ``point`` from the job's seed, with the same batches as every other, and measure it."""
    values = {**ground.config.model_dump(mode="json"), "method": point.method}
    config = parse_config(values, "the search")
    forget_all()
    model = resident(config)
    groups = [np.array([at]) for at in range(len(ground.train))]
    trained = train(model, model.adapter.read(), ground.train, groups, config, site=PUBLIC, round=1, plan=None)
    scores = evaluate(model, trained.state, ground.held_out, config)
    return float(scores.correct.sum() / scores.examples.sum())


def search(ground: Ground, output: Path, *, trials: int, random: int, seed: int, told: Told) -> Results:
    """Go on with the search in ``output``, or begin it, until there are ``trials``, the first ``random`` at random.

    The file is written anew after each trial, and what is chosen hangs on the trials in it and ``seed`` alone. Ends
    before where nothing is left to try.
    """
    found = begun(
        output,
        Results(
            digest=ground.digest,
            seed=seed,
            random=random,
            steps=ground.config.train.local_steps,
            records=len(ground.train),
            held_out=len(ground.held_out),
        ),
    )
    while len(found.trials) < trials:
        point = next_point(ground.space, found)
        if point is None:
            break
        told(len(found.trials), point)
        start = time.monotonic()
        accuracy = accuracy_of(ground, point)
        trial = Trial(
            **vars(point),
            numbers=ground.space.numbers(point),
            accuracy=accuracy,
            seconds=round(time.monotonic() - start, 3),
        )
        found = found.model_copy(update={"trials": (*found.trials, trial)})
        found.save(output)
    forget_all()
    told(len(found.trials), None)
    return found


def next_point(space: Space, found: Results) -> Point | None:
    """What to try after the trials of ``found``; None where all was tried."""
    random = np.random.default_rng([found.seed, len(found.trials)])
    points = [trial.point for trial in found.trials]
    if len(points) < max(1, found.random):
        return drawn(space, set(points), random)
    return chosen(space, points, [trial.accuracy for trial in found.trials], random)
