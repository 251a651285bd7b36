"""The simulated sites of a process: the code of a real site, behind a front that has them be away, late, or lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from ..client.answering import SiteClient
from ..client.app import own_name
from ..client.cohort import Cohort
from ..client.data import SiteData
from ..client.policy import Policy, load_policy, unrestricted
from ..client.securing import Identity
from ..client.surroundings import Surroundings
from ..core.config import RunConfig, config_from_json
from ..core.errors import UserError
from ..core.progress import SILENT, Watch
from ..core.recent import Recent
from ..core.wire import Kind, content_bytes, decode_job, no_answer
from ..strategies import LocalRule, Training
from .attackers import attacking, sends_nan, spoilt
from .backdoor import poisoned
from .fate import Doomed, Fate, Fates
from .identities import simulated
from .scenario import site_data

_KEEP = 2


@dataclass
class _Call:
    """One instruction: to whom, what is known of the run's faults, and what befalls the site in it."""

    message: Message
    context: Context
    site: str = ""
    fates: Fates | None = None
    fate: Fate | None = None


class SimulatedSites:
    """Answers for every site of a process as :class:`~fedgraft.client.answering.SiteClient` does, faults included.

    ``folder``: the run directory, in which the sites keep their records. A site that finds a `policy.toml` in its
    folder there keeps to it; the others have nobody to protect, and let out whatever the run asks for. ``cohort``: how
    many train in one pass.
    """

    def __init__(self, folder: Callable[[Context], Path], watch: Watch = SILENT, cohort: Cohort | None = None) -> None:
        def place(site: str, context: Context) -> Path:
            return folder(context) / "sites" / site

        def policy(here: Path | None, context: Context) -> Policy:
            own = here / "policy.toml" if here is not None else None
            return load_policy(own) if own is not None and own.exists() else unrestricted()

        def data(config: RunConfig, site: str, path: Path, context: Context) -> SiteData:
            return poisoned(site_data(config)[site], config)

        identities: Recent[str, Callable[[str], Identity]] = Recent(_KEEP)

        def identity(config: RunConfig, site: str, here: Path | None, context: Context) -> Identity:
            return identities.get(",".join((str(config.seed), *config.site_names)), lambda: simulated(config))(site)

        surroundings = Surroundings(own_name, place, policy, data, self._rule, durable=False, identity=identity)
        self._client = SiteClient(surroundings, watch, cohort)
        self._fates: Recent[str, Fates] = Recent(_KEEP)
        #: Whose training of the round at hand is lost.
        self._lost: dict[str, Fate] = {}

    def answer(self, kind: Kind, message: Message, context: Context) -> Message:
        """The answer of one site, or Flower's error reply in its place."""
        return self.answer_together(kind, [(message, context)])[0]

    def answer_together(self, kind: Kind, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The answers of several sites, whose trainings may share their passes through the base model.

        What befalls a site hangs on the run's seed, the site and the round alone. One that is away costs nothing.
        """
        every = [self._call(kind, message, context) for message, context in calls]
        there = [call for call in every if call.fate is None or call.fate.fault != "absent"]
        self._lost = {call.site: call.fate for call in there if call.fate is not None}
        given = iter(self._client.answer_together(kind, [(call.message, call.context) for call in there]))
        answers = []
        for call in every:
            if call.fate is not None and call.fate.fault == "absent":
                answers.append(no_answer(call.message, call.fate.fault, call.fate.why))
            else:
                answers.append(self._arrived(kind, call, next(given)))
        return answers

    def _call(self, kind: Kind, message: Message, context: Context) -> _Call:
        call = _Call(message, context)
        try:
            job = decode_job(message.content)
            fates = self._fates.get(job.config, lambda: Fates(config_from_json(job.config, "the server's instruction")))
            if fates.none:
                return call
            call.site, call.fates = own_name(fates.config, context), fates
        except UserError:
            return call  # the site itself says what is wrong with the instruction
        call.fate = fates.of(kind, call.site, job.round)
        if call.fate is None and kind == "train" and fates.clock.runs:
            call.fate = fates.late(call.site, content_bytes(message.content))
        if call.fate is not None and call.fate.fault == "late" and fates.config.server.most_late:
            call.fate = None  # it is waited for: see Delays, which holds its answer back
        return call

    def _arrived(self, kind: Kind, call: _Call, answer: Message) -> Message:
        """What the server gets in place of ``answer``."""
        if call.fates is None:
            return answer
        fate, refusal = call.fate, str(answer.content["site"]["error"])
        awaited = call.fates.config.server.most_late
        if fate is None and kind == "train" and call.fates.clock.runs and not awaited:
            fate = call.fates.late(call.site, content_bytes(call.message.content), content_bytes(answer.content))
        if fate is not None and refusal in ("", fate.why):
            if fate.fault == "crashed":
                call.context.state = RecordDict()  # what its process held is gone
            return no_answer(call.message, fate.fault, fate.why)
        return spoilt(answer, call.message) if sends_nan(call.fates.config, call.site) else answer

    def _rule(self, rule: LocalRule | None, config: RunConfig, training: Training) -> LocalRule | None:
        """The part of a simulated site in a strategy: its own, an attacker's, or one that comes to nothing."""
        rule = attacking(rule, config, training)
        fate = self._lost.get(training.site)
        if fate is None:
            return rule
        memory = rule.memory if rule is not None else {}
        return Doomed(training, memory, rule, fate, owes=config.server.upload == "topk")
