"""Trainings of several sites of one process."""

from __future__ import annotations

from collections.abc import Sequence

from .trainer import Lesson, Trained


def train_together(lessons: Sequence[Lesson]) -> list[Trained | Exception]:
    """The result of each lesson, or what went wrong in it: one site's failure is not another's."""
    return [_alone(lesson) for lesson in lessons]


def _alone(lesson: Lesson) -> Trained | Exception:
    try:
        return lesson.train()
    except Exception as error:
        return error
