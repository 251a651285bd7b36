"""How many sites train in one: as many as were asked for, or as many as a measurement finds to pay."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...core.errors import one_line
from ..trainer import Lesson, Trained
from .fitting import why_alone
from .training import CannotShareError, train_in_one

#: Sites that are taken at a time as long as nothing is decided, and at most.
MOST = 32
_SIZES = (2, 4, 8, 16, 32)
_STEPS, _TIMES = 2, 3
#: Seconds that the measurement may take, about.
_BUDGET = 4.0
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
            return f"cohort 1: several sites in one pass are {self.speed:.1f} times as fast as one after another here"
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
        if not _same(rehearsals[:2]):
            return Decision(1, same=False)
        # Where steps are slow, fewer sites and one look at each size must do.
        one = _seconds(rehearsals[:2], 1) * _STEPS
        times = _TIMES if one * _TIMES * 2 * len(_SIZES) < _BUDGET else 1
        rehearsals = rehearsals[: max(2, int(_BUDGET / (one * times * len(_SIZES))))]
        sizes = sorted({size for size in (*_SIZES, len(rehearsals)) if size <= len(rehearsals)})
        if not _same(rehearsals):
            return Decision(1, same=False)
        seconds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
        for _ in range(times):
            for size, found in seconds.items():
                found.append(_seconds(rehearsals, size))
    except CannotShareError as error:
        return Decision(1, why=one_line(error))
    except Exception as error:
        # The training itself will say what is wrong.
        return Decision(1, why=f"nothing could be measured ({type(error).__name__})")
    medians = {size: statistics.median(found) for size, found in seconds.items()}
    best = min(sizes, key=lambda size: medians[size])
    speed = medians[1] / medians[best]
    return Decision(best if speed >= _PAYS else 1, speed, steps=tuple(medians.items()))


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


def _same(lessons: Sequence[Lesson]) -> bool:
    together = train_in_one(lessons)
    alone = [lesson.train() for lesson in lessons]
    return all(isinstance(a, Trained) and a.state == b.state for a, b in zip(together, alone, strict=True))


def _seconds(lessons: Sequence[Lesson], size: int) -> float:
    """Seconds that a site's step takes with ``size`` sites in one."""
    some = lessons[: max(size, len(lessons) // size * size)]
    began = time.perf_counter()
    if size == 1:
        for lesson in some:
            lesson.train()
    else:
        for start in range(0, len(some), size):
            train_in_one(some[start : start + size])
    if lessons[0].resident.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (len(some) * _STEPS)
