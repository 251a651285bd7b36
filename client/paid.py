"""Answers that are paid for: asked for again, or broken off, they are not paid for twice."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from flwr.app import RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.progress import Watch
from ..core.wire import Job, Kind
from .attempt import Attempt, attempt
from .keptanswers import KeptAnswer
from .prepared import Prepared
from .visit import Here


class Paid:
    """Says what was answered before, and what was begun; ``keeps``: whether that outlives the process."""

    def __init__(self, keeps: bool, watch: Watch) -> None:
        self._keeps, self._watch = keeps, watch

    def kept(self, kind: Kind, job: Job, config: RunConfig, here: Here, prepared: Prepared) -> KeptAnswer:
        """The answer to an instruction that is paid for; of a secure sum none is sent twice."""
        keeps = self._keeps and config.privacy.enabled
        keeps &= kind == "evaluate" or not config.secure_sum.enabled
        data = f"{here.dataset.name}|{prepared.fingerprint}|{prepared.split}"
        return KeptAnswer(here.folder if keeps else None, kind, job, config, here.site, data)

    def unpaid(self, kind: Kind, job: Job, config: RunConfig, here: Here, prepared: Prepared) -> Job:
        """``job`` as of the first round from its own on that this site has not answered, and so paid for, before."""
        while self.kept(kind, job, config, here, prepared).given:
            job = replace(job, round=job.round + 1)
        return job

    def repeated(self, kept: KeptAnswer, about: AdapterState, job: Job, here: Here) -> RecordDict | None:
        """What this site answered when it was asked the same before."""
        answer = kept.find(about)
        if answer is not None:
            here.told["repeated"] = True
            self._watch.note(f"site {here.site}: asked for round {job.round} again; the same answer is sent, unpaid")
        return answer

    def attempt(self, kind: Kind, config: RunConfig, here: Here) -> AbstractContextManager[Attempt]:
        """An attempt at what is paid for, which outlives this process where answers do."""
        return attempt(here.folder if self._keeps and config.privacy.enabled else None, kind)

    def resumed(self, job: Job, here: Here) -> None:
        """Tell that what a process that died had set aside is used, and no more."""
        here.told["resumed"] = True
        self._watch.note(f"site {here.site}: round {job.round} was broken off and is done again, paid for once")


def terms(job: Job, config: RunConfig, here: Here, *states: AdapterState) -> list[object]:
    """What an instruction says, and the states that it is about: all that decides what becomes of it, but the data."""
    about = [config.digest(), job.run, job.round, job.fingerprint, here.site]
    return [*about, *(f"{state.spec.digest}|{state.digest}" for state in states)]
