"""The file of a search: each trial as it came, so that a search that was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ...core.errors import UserError, one_line
from ...server.files import write_json
from .front import front_of
from .space import Point


class Trial(BaseModel):
    """One configuration, how many numbers of it train beside the head, and its accuracy on the held-out records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...]
    serial: int
    parallel: int
    prefix: int
    numbers: int
    accuracy: float
    seconds: float

    @property
    def point(self) -> Point:
        return Point(self.layers, self.serial, self.parallel, self.prefix)


class Results(BaseModel):
    """A search. ``digest``: of all that a trial's outcome hangs on beside its point; ``trials`` in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    digest: str
    seed: int
    random: int
    steps: int
    records: int
    held_out: int
    trials: tuple[Trial, ...] = ()

    @property
    def front(self) -> list[Trial]:
        """The trials that no other dominates, by how much trains."""
        found = front_of([trial.numbers for trial in self.trials], [trial.accuracy for trial in self.trials])
        return [self.trials[at] for at in found]

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


def begun(path: Path, fresh: Results) -> Results:
    """What ``path`` holds of the search ``fresh``, or ``fresh`` where there is no file.

    Raises :class:`UserError` for a file of another search, or of something else.
    """
    if not path.exists():
        return fresh
    try:
        found = Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: no results of a search: {one_line(error)[:200]}; choose another --output") from None
    for key in ("seed", "random", "digest"):
        if getattr(found, key) != getattr(fresh, key):
            what = "job, --set, --steps or --data" if key == "digest" else f"--{key}"
            raise UserError(f"{path}: holds a search with another {what}; choose another --output, or remove it")
    return found
