"""Trainings of several sites of one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core.errors import one_line
from .cohort import train_in_one
from .cohort.fitting import fitting_groups
from .cohort.training import CannotShareError
from .trainer import Lesson, Trained

log = logging.getLogger("fedgraft.site")


def train_together(lessons: Sequence[Lesson]) -> list[Trained | Exception]:
    """The result of each lesson, or what went wrong in it: one site's failure is not another's.

    Those that see the same base model pass through it together; the result is that of one after another.
    """
    results: dict[int, Trained | Exception] = {}
    for places in fitting_groups(lessons):
        group = [lessons[place] for place in places]
        results.update(zip(places, _trained(group), strict=True))
    return [results[place] for place in range(len(lessons))]


def _trained(lessons: Sequence[Lesson]) -> list[Trained | Exception]:
    if len(lessons) > 1:
        try:
            return train_in_one(lessons)
        except CannotShareError as error:
            log.debug("%d sites train one after another: %s", len(lessons), one_line(error))
    return [_alone(lesson) for lesson in lessons]


def _alone(lesson: Lesson) -> Trained | Exception:
    try:
        return lesson.train()
    except Exception as error:
        return error
