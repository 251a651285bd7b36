"""How many sites train in one: as many as were asked for, or as many as a measurement finds to pay."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...core.adapter import AdapterState
from ...core.config import RunConfig
from ...core.errors import one_line
from ..trainer import Lesson, Trained
from .fitting import why_alone
from .training import CannotShareError, train_in_one

#: Sites that are taken at a time as long as nothing is decided, and at most.
MOST = 32
_SIZES = (2, 4, 8, 16, 32)
_STEPS, _TIMES = 2, 3
#: Of what is left to train, the part that the measurement may take, and its seconds at most.
_SHARE, _BUDGET = 0.05, 4.0
#: Seconds of a step from which one site keeps a processor busy.
_BUSY = 0.1
#: What is not faster by this factor is not worth it.
_PAYS = 1.1


@dataclass(frozen=True)
class Decision:
    """How many sites train in one, and what was measured for it.

    ``speed``: how many times as fast as one after another; ``same``: whether the adapters came out the same to the
    bit; ``steps``: by number of sites, seconds a site and step, 1: one after another; ``why``: where nothing was
    measured, the reason.
    """

    size: int
    speed: float = 1.0
    same: bool = True
    steps: tuple[tuple[int, float], ...] = ()
    why: str = ""

    @property
    def text(self) -> str:
        """For people, in one line."""
        if self.why:
            return f"cohort 1: {self.why}"
        if not self.same:
            return "cohort 1: several sites in one pass round otherwise here than one after another"
        if self.size == 1:
            return f"cohort 1: several sites in one pass are {self.speed:.2f} times as fast as one after another here"
        return f"cohort {self.size}: {self.speed:.1f} times as fast as one after another, same bits"


class Cohort:
    """How many sites train in one. ``size``: so many; 0: as many as the first training's measurement finds to pay.

    What is measured decides nothing but time: where one pass would give other bits, sites train one after another.
    """

    def __init__(self, size: int = MOST) -> None:
        self.decision = Decision(size) if size else None
        #: Told of the decision once it is made.
        self.on_decision: Callable[[Decision], None] = lambda decision: None

    @property
    def most(self) -> int:
        """How many sites to take at a time."""
        return MOST if self.decision is None else self.decision.size

    def size_for(self, lessons: Sequence[Lesson]) -> int:
        """How many of ``lessons``, which fit together, to train in one."""
        if self.decision is None and (len(lessons) > 1 or why_alone(lessons[0])):
            self.decision = measured(lessons)
            self.on_decision(self.decision)
        return 1 if self.decision is None else self.decision.size


def measured(lessons: Sequence[Lesson]) -> Decision:
    """What pays for trainings like these, by a few steps of theirs both ways.

    Their samples and noise come from seeds of the rehearsal's own, and its results are dropped: nothing is released,
    and no stream, ledger or rule of a site is touched.
    """
    if why := why_alone(lessons[0]):
        return Decision(1, why=why)
    try:
        rehearsals = [_rehearsal(lesson) for lesson in lessons[:MOST]]
        _rehearse(rehearsals[:1], 1)  # what comes first takes longer
        step, _ = _rehearse(rehearsals[:2], 1)
        if step > _BUSY and lessons[0].resident.device.type == "cpu":
            return Decision(1, why=f"a step of one site, {1000 * step:.0f} ms, keeps the processor busy")
        budget = min(_BUDGET, _SHARE * step * _steps_left(lessons[0].config, lessons[0].round))
        # At the least as many sites once in one and once one after another.
        rehearsals = rehearsals[: int(budget / (2 * _STEPS * step))]
        if len(rehearsals) < 2:
            return Decision(1, why="too little is left to train for a measurement to pay")
        sizes = sorted({size for size in (*_SIZES, len(rehearsals)) if size <= len(rehearsals)}, reverse=True)
        return _compared(rehearsals, [sizes[0], 1, *sizes[1:]], budget)
    except CannotShareError as error:
        return Decision(1, why=one_line(error))
    except Exception as error:
        # The training itself will say what is wrong.
        return Decision(1, why=f"nothing could be measured ({type(error).__name__})")


def _compared(lessons: Sequence[Lesson], sizes: Sequence[int], budget: float) -> Decision:
    """The best of ``sizes``, by a look at the first two of them and at as many more as ``budget`` seconds allow."""
    seconds: dict[int, list[float]] = {}
    alone: list[AdapterState] = []
    together: list[list[AdapterState]] = []
    began = time.perf_counter()
    for number, size in enumerate([*sizes] * _TIMES):
        if number >= 2 and time.perf_counter() - began > budget:
            break
        found, states = _rehearse(lessons, size)
        if size == 1:
            alone = states
        elif size not in seconds:
            together.append(states)
        seconds.setdefault(size, []).append(found)
    if any(states != alone for states in together):
        return Decision(1, same=False)
    medians = {size: statistics.median(found) for size, found in sorted(seconds.items())}
    best = min((size for size in medians if size > 1), key=lambda size: medians[size])
    speed = medians[1] / medians[best]
    return Decision(best if speed >= _PAYS else 1, speed, steps=tuple(medians.items()))


def _steps_left(config: RunConfig, round: int) -> int:
    """Steps of all sites that the run has still to take."""
    sites = config.server.sites_per_round or len(config.site_names)
    return (config.rounds - round + 1) * sites * config.train.local_steps


def _rehearsal(lesson: Lesson) -> Lesson:
    """A few steps of a training that never happens."""
    train = lesson.config.train.model_copy(update={"local_steps": _STEPS})
    config = lesson.config.model_copy(update={"train": train, "seed": int.from_bytes(os.urandom(7))})
    plan = replace(lesson.plan, seeded_noise_not_private=True) if lesson.plan is not None else None
    return replace(
        lesson,
        config=config,
        plan=plan,
        rule=None,
        on_step=lambda step, loss: None,
    )


def _rehearse(lessons: Sequence[Lesson], size: int) -> tuple[float, list[AdapterState]]:
    """Seconds that a site's step takes with ``size`` sites in one, and the adapters that came out."""
    began = time.perf_counter()
    results: list[Trained | Exception] = []
    for start in range(0, len(lessons), size):
        some = lessons[start : start + size]
        results += train_in_one(some) if size > 1 else [lesson.train() for lesson in some]
    if lessons[0].resident.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (len(lessons) * _STEPS)
    return seconds, [_state(result) for result in results]


def _state(result: Trained | Exception) -> AdapterState:
    if isinstance(result, Exception):
        raise result
    return result.state
