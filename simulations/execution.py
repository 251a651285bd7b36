"""How a simulation is computed: which engine, on how many processes and threads. None of it changes what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.errors import UserError

Engine = Literal["auto", "inprocess", "workers", "flower"]
ENGINES: tuple[str, ...] = ("auto", "inprocess", "workers", "flower")


@dataclass(frozen=True)
class Execution:
    """What the machine is to do, which is no part of the run's configuration.

    ``workers``: processes of the engine `workers`, 0: one a GPU, or one a core; ``threads``: of the arithmetic, in each
    process, 0: all cores divided by the processes; ``cohort``: sites that train in one pass through the base model,
    1: one after another, 0: as many as a measurement finds to pay; ``profile``: tell where the time went.

    Raises :class:`UserError` for what makes no sense.
    """

    engine: Engine = "inprocess"
    workers: int = 0
    threads: int = 0
    cohort: int = 1
    profile: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"unknown engine `{self.engine}`; there are {', '.join(ENGINES)}")
        for name in ("workers", "threads", "cohort"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} is negative; 0 lets the engine choose")
        if self.workers and self.engine not in ("auto", "workers"):
            raise UserError(f"--workers is for the engine `workers`, not `{self.engine}`")
        if self.cohort > 1 and self.engine == "flower":
            raise UserError(
                "--cohort is for the engines `inprocess` and `workers`: Flower's runtime asks each site alone"
            )
        if self.profile and self.engine == "flower":
            raise UserError(
                "--profile is for the engines `inprocess` and `workers`: Flower's runtime has other processes"
            )
