"""Trainings of several sites of one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core.errors import one_line
from .cohort import CannotShareError, Cohort, train_in_one
from .cohort.fitting import fitting_groups
from .trainer import Lesson, Trained

log = logging.getLogger("fedgraft.site")


def train_together(lessons: Sequence[Lesson], cohort: Cohort) -> list[Trained | Exception]:
    """The result of each lesson, or what went wrong in it: one site's failure is not another's.

    As many as ``cohort`` says pass through the base model together; the result is that of one after another.
    """
    results: dict[int, Trained | Exception] = {}
    for places in fitting_groups(lessons):
        size = cohort.size_for([lessons[place] for place in places])
        for start in range(0, len(places), size):
            some = places[start : start + size]
            results.update(zip(some, _trained([lessons[place] for place in some]), strict=True))
    return [results[place] for place in range(len(lessons))]


def _trained(lessons: Sequence[Lesson]) -> list[Trained | Exception]:
    if len(lessons) > 1:
        try:
            return train_in_one(lessons)
        except CannotShareError as error:
            # Each begins again alone, to the same result.
            log.warning("%d sites train one after another: %s", len(lessons), one_line(error))
    return [_alone(lesson) for lesson in lessons]


def _alone(lesson: Lesson) -> Trained | Exception:
    try:
        return lesson.train()
    except Exception as error:
        return error
