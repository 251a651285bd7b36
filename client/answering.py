"""The site's side of the conversation: an instruction in, an answer out, and nothing else leaves."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from ..core.adapter import AdapterSpec, AdapterState
from ..core.config import RunConfig, config_from_json
from ..core.errors import PrivateError, UserError, one_line
from ..core.profile import section
from ..core.progress import SILENT, Watch
from ..core.recent import Recent
from ..core.watching import tracing
from ..core.wire import (
    NEEDS_STATE,
    STEPS,
    Job,
    Kind,
    decode_adapter,
    decode_answer,
    decode_job,
    decode_table,
    encode_adapter,
    encode_answer,
    encode_masked,
    encode_refusal,
    record_of,
)
from ..privacy.auditlog import AuditLog
from ..privacy.clipping import require_exact
from ..privacy.correlated import CorrelatedNoise, seeded_key_not_private, site_key
from ..privacy.ledger import OverspentError
from ..privacy.noise import RandomStream
from ..privacy.plan import PrivacyPlan
from ..privacy.release import noised
from ..privacy.securesum import SecureSite, Terms
from ..strategies import LocalRule, Training, create_aggregator
from .attempt import Attempt, attempt
from .budget import event_of_release, plan_of, planned, promise, require_room, reserve, reserve_training, resume
from .cohort import Cohort
from .data import SiteData
from .devicememory import OnSmaller
from .evaluation import evaluate
from .gate import left, require_allowed, require_masked, require_refusal, require_step
from .job import own_version, sharing
from .keptanswers import KeptAnswer
from .memory import SiteMemory
from .policy import Dataset, NoPolicyError, Policy, PolicyError
from .prepared import Encoded, Prepared, encode, ledger_of
from .resident import Resident, resident
from .securing import Identity, SecureSums, envelopes_of, mask
from .together import train_together
from .trainer import Lesson, Trained, require_memory
from .upload import packed

log = logging.getLogger("fedgraft.site")
_NOISES = 8
_BOOKS = 32
_VERSIONS = 16
# What a site remembers beside what its strategy does, by name.
_LOCAL, _PERSONAL = "site-local", "site-personal"


#: What answering takes: it may ask for trainings, and ends with what is sent.
Course = Generator[Lesson, Trained, RecordDict]


def _nobody(config: RunConfig, site: str, folder: Path | None, context: Context) -> Identity:
    raise UserError(f"site {site} has no signing key and no roster, which a secure sum needs")


def _require_round(kind: Kind, job: Job, config: RunConfig) -> None:
    """Raise :class:`UserError` for a round that the run does not have: plans and schedules know nothing of it."""
    first, last = int(kind not in ("hello", "evaluate")), config.rounds + (kind == "hello")
    if not first <= job.round <= last:
        raise UserError(f"the run has no round {job.round} to {kind}: it has {config.rounds}; set rounds")


class _StateNotHeldError(UserError):
    """The instruction builds on a global adapter that this site does not hold."""


@dataclass(frozen=True)
class Surroundings:
    """What a site's own machine supplies, and no instruction can.

    ``name``: which site it is (of the run, where there is a configuration); ``folder``: its own folder, for ledgers and
    audit log, None to keep none (for tests); ``policy``: what it lets out, from that folder; ``data``: its records, at
    the place that the policy names. ``rule`` gives a simulated attacker its own part in place of the strategy's.
    ``durable``: whether ledger and audit log survive a loss of power, see :mod:`fedgraft.privacy.journal`.
    ``identity``: the site's signing key and its roster of the others', for secure sums. ``keeps``: whether paid answers
    are kept in the folder, see :mod:`.keptanswers`; those of thousands of simulated sites would fill a disk.
    """

    name: Callable[[RunConfig | None, Context], str]
    folder: Callable[[str, Context], Path | None]
    policy: Callable[[Path | None, Context], Policy]
    data: Callable[[RunConfig, str, Path, Context], SiteData]
    rule: Callable[[LocalRule | None, RunConfig, Training], LocalRule | None] = lambda rule, config, training: rule
    durable: bool = True
    keeps: bool = False
    identity: Callable[[RunConfig, str, Path | None, Context], Identity] = _nobody


@dataclass(frozen=True)
class _Here:
    """The site that answers, and what it lets this job do; ``told``: what the audit log says beside the answer."""

    site: str
    folder: Path | None
    context: Context
    policy: Policy
    dataset: Dataset
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Visit:
    """What is known of an instruction so far."""

    kind: Kind
    durable: bool
    site: str = "?"
    folder: Path | None = None
    job: Job | None = None
    digest: str = ""
    here: _Here | None = None
    began: float = field(default_factory=time.monotonic)

    def log(self, event: str, **values: Any) -> None:
        """Write a line into the site's audit log. Raises :class:`UserError` when that cannot be."""
        job = self.job
        about = {"run": job.run, "round": job.round} if job is not None else {}
        about |= {"job": self.digest} if self.digest else {}
        with section("disk"):
            audit_log = AuditLog(self.folder, durable=self.durable)
            audit_log.write(event, site=self.site, kind=self.kind, **about, **values)

    def trace(self, event: str, seconds: float, error: str) -> None:
        """Make a span of the instruction, where the site asks for spans."""
        job = self.job
        about: dict[str, Any] = {"run": job.run, "round": job.round} if job is not None else {}
        span = tracing.begin(f"fedgraft.{self.kind}", seconds_ago=seconds, site=self.site, kind=self.kind, **about)
        tracing.end(span, error, event=event)


class SiteClient:
    """The site's side of the conversation; one object serves every site of a process and keeps what is costly."""

    def __init__(self, surroundings: Surroundings, watch: Watch = SILENT, cohort: Cohort | None = None) -> None:
        self._surroundings = surroundings
        self._watch = watch
        self._cohort = cohort or Cohort()
        self._cohort.on_decision = lambda decision: watch.cohort_found(decision.size, decision.text)
        self._encoded: dict[tuple[str, ...], Encoded] = {}
        self._sharing: Recent[tuple[str | int, ...], Callable[[str], tuple[str, ...]]] = Recent(_VERSIONS)
        # Ledgers and memories: those of the last sites, since files hold what they know; those of sites without a
        # folder (in tests) are all there is.
        self._books: Recent[tuple[str, ...], Any] = Recent(_BOOKS)
        self._loose: Recent[tuple[str, ...], Any] = Recent(None)
        # Correlated noise goes on from round to round; its last rows are kept, or would have to be drawn anew.
        self._noise: OrderedDict[tuple[str, ...], CorrelatedNoise] = OrderedDict()
        self._sums = SecureSums(durable=surroundings.durable)
        # Decisions that are in the audit log already: the policy and the job have not changed since.
        self._admitted: set[tuple[str, ...]] = set()
        # The global adapter as it was last received, shared by the sites of this process: decoded, and as it is held.
        self._states: Recent[tuple[str, str], tuple[AdapterState, Mapping[str, Any]]] = Recent(2)

    def answer(self, kind: Kind, message: Message, context: Context) -> Message:
        """Do what the instruction says; a failure becomes a one-line answer that names the site."""
        return self.answer_together(kind, [(message, context)])[0]

    def answer_together(self, kind: Kind, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The answers of several sites of this process, whose trainings may share their passes through the base model.

        Each site decides, spends, passes its gate and writes its audit log as if it were alone.
        """
        visits = [_Visit(kind, self._surroundings.durable) for _ in calls]
        courses = [
            self._answered(visit, message.content, context)
            for visit, (message, context) in zip(visits, calls, strict=True)
        ]
        contents: dict[int, RecordDict | Exception] = {}
        waiting: dict[int, Lesson] = {}
        results: dict[int, Trained | Exception | None] = dict.fromkeys(range(len(calls)))
        while results:
            for index, result in results.items():
                try:
                    course = courses[index]
                    going = course.throw(result) if isinstance(result, Exception) else course.send(result)  # type: ignore[arg-type]
                    waiting[index] = going
                except StopIteration as end:
                    contents[index] = end.value
                except Exception as error:
                    contents[index] = error
            results = dict(zip(waiting, train_together(list(waiting.values()), self._cohort), strict=True))
            waiting = {}
        return [
            Message(self._concluded(visit, contents[index]), reply_to=message)
            for index, (visit, (message, _)) in enumerate(zip(visits, calls, strict=True))
        ]

    def _concluded(self, visit: _Visit, content: RecordDict | Exception) -> RecordDict:
        """What is sent in the end, with its line in the audit log."""
        told: dict[str, Any] = {}
        if not isinstance(content, Exception):
            try:
                with section("gate"):
                    event, told = "left", left(content) | (visit.here.told if visit.here is not None else {})
            except Exception as error:
                content = error
        if isinstance(content, Exception):
            event, told, content = "refused", self._reason(content, visit), self._refusal(content, visit)
        try:
            seconds = round(time.monotonic() - visit.began, 3)
            visit.log(event, seconds=seconds, **told)
            visit.trace(event, seconds, str(told.get("why", "")))
        except Exception as error:
            log.error("site %s: %s", visit.site, one_line(error))
            content = self._refusal(error, visit)
        self._watch.site_finished(visit.kind, visit.site)
        return content

    def _answered(self, visit: _Visit, content: RecordDict, context: Context) -> Course:
        """The answer to an instruction, past the gate."""
        with contextlib.suppress(UserError):
            # Known before the instruction is read, so that a bad one is in the audit log too.
            visit.site = self._surroundings.name(None, context)
            visit.folder = self._surroundings.folder(visit.site, context)
        job = visit.job = decode_job(content)
        config = config_from_json(job.config, "the server's configuration")
        visit.digest = config.digest()
        site = visit.site = self._surroundings.name(config, context)
        if job.site and job.site != site:
            raise UserError(f"this is site {site}, the instruction is for {job.site}")
        folder = visit.folder = self._surroundings.folder(site, context)
        policy = self._surroundings.policy(folder, context)
        dataset = policy.dataset_of(config, site, str(context.node_config.get("dataset", "")))
        here = visit.here = _Here(site, folder, context, policy, dataset)
        _require_round(visit.kind, job, config)
        config = own_version(config, site)
        policy.admit(config, job.fingerprint, dataset)
        decided = (str(folder), job.run, visit.digest, policy.digest, dataset.name)
        if decided not in self._admitted:
            visit.log("allowed", dataset=dataset.name, policy={"file": policy.file, "sha256": policy.digest})
            self._admitted.add(decided)
        # Whatever would stop a secure sum later must stop it now, before anything is trained.
        secure, received = self._secure(visit.kind, job, config, here), None
        if secure is not None and visit.kind in STEPS:
            return self._step(visit.kind, job, here, secure, content)
        if visit.kind == "train":
            if secure is not None:
                secure.admit(envelopes_of(content))
            with self._attempt("train", config, here) as attempt:
                answer, received = yield from self._train(job, config, here, content, attempt)
        elif visit.kind == "refine":
            answer, received = self._refine(job, config, here, content)
        else:
            handler = self._hello if visit.kind == "hello" else self._evaluate
            answer = handler(job, config, here, content)
        with section("gate"):
            require_allowed(
                visit.kind,
                answer,
                config=config,
                policy=policy,
                dataset=dataset,
                fingerprint=job.fingerprint,
                received=received,
            )
        if secure is not None and received is not None:
            return self._masked(job, visit.digest, here, secure, content, answer, received)
        return answer

    def _secure(self, kind: Kind, job: Job, config: RunConfig, here: _Here) -> SecureSite | None:
        """This site's side of the secure sum that an instruction of ``kind`` belongs to; None where to none."""
        if not config.secure_sum.enabled and kind in STEPS:
            raise UserError("the run has no secure sum (secure_sum.enabled = false)")
        if not config.secure_sum.enabled or kind == "evaluate":
            return None
        if kind == "refine":
            raise UserError("the run has a secure sum, and a second answer would be in the open; nothing is sent")
        identity = self._surroundings.identity(config, here.site, here.folder, here.context)
        return self._sums.open(job, config, here.site, here.folder, identity)

    def _step(self, kind: Kind, job: Job, here: _Here, secure: SecureSite, content: RecordDict) -> RecordDict:
        """The answer to an exchange of a secure sum beside the training."""
        record = self._sums.answer(kind, secure, content, here.folder)
        answer = encode_answer(kind, site=here.site, round=job.round, adapter=record)
        with section("gate"):
            require_step(kind, answer)
        return answer

    def _masked(
        self,
        job: Job,
        digest: str,
        here: _Here,
        secure: SecureSite,
        content: RecordDict,
        answer: RecordDict,
        received: AdapterState,
    ) -> RecordDict:
        """What leaves in place of ``answer``, which has passed the gate: masked numbers, and no weight beside them."""
        plain = decode_answer(answer, "train", here.site)
        names = received.spec.select("share")
        state = decode_adapter(answer, received.spec, sender=here.site, names=names, base=received)
        weight = int(plain.metrics["records"])
        with section("wire"):
            entries, beyond = mask(secure, content, state, received, weight, f"{digest}|{job.fingerprint}".encode())
        if beyond:
            self._watch.note(
                f"site {here.site}: {beyond} of {entries.size - 1} numbers changed by more than secure_sum.range "
                f"{secure.terms.limit:g} and count as that; raise it, or train.lr is too large"
            )
        # On the disk before it leaves: what was masked once is never masked again with the same masks.
        self._sums.keep(secure, here.folder)
        sent = encode_answer(
            "train",
            site=here.site,
            round=job.round,
            metrics={"steps": plain.metrics["steps"]},
            privacy=plain.privacy,
            adapter=encode_masked(entries),
        )
        with section("gate"):
            require_masked(sent, entries.size, secure.terms.ring.dtype)
        return sent

    def _smaller(self, site: str) -> OnSmaller:
        """What tells whoever watches, at the site, that fewer examples pass at a time."""
        return lambda setting, size, text: self._watch.smaller_batch(site, setting, size, text)

    def _refusal(self, error: Exception, visit: _Visit) -> RecordDict:
        log.error("site %s: %s", visit.site, one_line(error), exc_info=not isinstance(error, UserError))
        if isinstance(error, PrivateError) or not isinstance(error, UserError):
            # The answer says less than this, and whoever watches sits at the site.
            self._watch.note(f"site {visit.site}: {one_line(error)}")
        code = NEEDS_STATE if isinstance(error, _StateNotHeldError) else ""
        number = visit.job.round if visit.job is not None else 0
        content = encode_refusal(_sendable(error, visit.folder), site=visit.site, round=number, code=code)
        require_refusal(content)
        return content

    def _reason(self, error: Exception, visit: _Visit) -> dict[str, Any]:
        """Why nothing leaves, for the audit log, which quotes no record and names the policy's line."""
        rule = error.rule if isinstance(error, PolicyError) else None
        if isinstance(error, OverspentError) and visit.here is not None:
            rule = visit.here.policy.limits(visit.here.dataset).get(error.limit)
        private = isinstance(error, PrivateError) and not isinstance(error, NoPolicyError)
        why: dict[str, Any] = {"why": type(error).__name__}
        if isinstance(error, UserError) and not private:
            why["why"] = one_line(error)
        if rule is not None:
            why["rule"] = rule.record
        return why

    def _hello(self, job: Job, config: RunConfig, here: _Here, content: RecordDict) -> RecordDict:
        prepared, model = self._site(job, config, here)
        self._rule(job, config, here.site, {})  # a site that cannot do its part says so now
        if config.secure_sum.enabled:
            Terms.of(config, job.run, job.round).ring.require_weight(len(prepared.train))
        if job.round <= config.rounds:
            smaller = self._smaller(here.site)
            require_memory(model, prepared.train, config, private=config.privacy.enabled, on_smaller=smaller)
        if config.privacy.enabled:
            # Whatever would stop the run later must stop it now, before any site has spent anything.
            train = self._unpaid("train", job, config, here, prepared)
            evaluation = self._unpaid("evaluate", job, config, here, prepared)
            if train.round <= config.rounds:
                plan = plan_of(train, config, prepared)
                require_room(prepared, plan.events(plan.first_step, plan.steps), "train")
                require_exact(model.adapter.model, model.adapter.trainables(), config.privacy.engine)
            if config.evaluation_release == "noised" and evaluation.round <= config.rounds:
                require_room(prepared, event_of_release(evaluation, config, prepared), "held-out")
        sizes = {"records": len(prepared.train), "held_out": len(prepared.held_out), "units": len(prepared.groups)}
        return encode_answer(
            "hello",
            site=here.site,
            round=job.round,
            # Under a secure sum the weight of a site is part of what the server must not see.
            metrics={} if config.secure_sum.enabled else sizes,
            facts={
                "spec": model.adapter.spec.bare.digest,
                "fingerprint": job.fingerprint,
            },
            privacy=promise(config, prepared),
        )

    def _kept(self, kind: Kind, job: Job, config: RunConfig, here: _Here, prepared: Prepared) -> KeptAnswer:
        """The answer to an instruction that is paid for; of a secure sum none is sent twice."""
        keeps = self._surroundings.keeps and config.privacy.enabled
        keeps &= kind == "evaluate" or not config.secure_sum.enabled
        data = f"{here.dataset.name}|{prepared.fingerprint}|{prepared.split}"
        return KeptAnswer(here.folder if keeps else None, kind, job, config, here.site, data)

    def _unpaid(self, kind: Kind, job: Job, config: RunConfig, here: _Here, prepared: Prepared) -> Job:
        """``job`` as of the first round from its own on that this site has not answered, and so paid for, before."""
        while self._kept(kind, job, config, here, prepared).given:
            job = replace(job, round=job.round + 1)
        return job

    def _repeated(self, kept: KeptAnswer, about: AdapterState, job: Job, here: _Here) -> RecordDict | None:
        """What this site answered when it was asked the same before."""
        answer = kept.find(about)
        if answer is not None:
            here.told["repeated"] = True
            self._watch.note(f"site {here.site}: asked for round {job.round} again; the same answer is sent, unpaid")
        return answer

    def _attempt(self, kind: Kind, config: RunConfig, here: _Here) -> AbstractContextManager[Attempt]:
        """An attempt at what is paid for, which outlives this process where answers do."""
        return attempt(here.folder if self._surroundings.keeps and config.privacy.enabled else None, kind)

    def _resumed(self, job: Job, here: _Here) -> None:
        """Tell that what a process that died had set aside is used, and no more."""
        here.told["resumed"] = True
        self._watch.note(f"site {here.site}: round {job.round} was broken off and is done again, paid for once")

    def _train(
        self, job: Job, config: RunConfig, here: _Here, content: RecordDict, attempt: Attempt
    ) -> Generator[Lesson, Trained, tuple[RecordDict, AdapterState]]:
        """The answer of a training, and the adapter that it was about."""
        prepared, model = self._site(job, config, here)
        received = self._receive(content, here.context, model)
        here.policy.require_tensors(received.spec.select("share"))
        kept = self._kept("train", job, config, here, prepared)
        if (repeated := self._repeated(kept, received, job, here)) is not None:
            return repeated, received
        memory = self._memory(job, here)
        known = memory.before(job.round)
        state = _with_local(received, known)
        rule = self._rule(job, config, here.site, known)
        if rule is not None:
            state = rule.begin(state, self._loss(config, prepared, model) if rule.needs_loss else None)
        record = record_of(here.context.state, "clip", ConfigRecord) or ConfigRecord()
        clip = float(record["clip"]) if record.get("run") == job.run else None  # type: ignore[arg-type]
        plan = told = reserved = again = noise = None
        if config.privacy.enabled:
            require_exact(model.adapter.model, model.adapter.trainables(), config.privacy.engine)
            kept.require_room(sum(array.nbytes for array in received.values()))
            plan, again = planned(
                attempt,
                prepared,
                partial(plan_of, job, config, prepared),
                lambda: [*_terms(job, config, here, state, *known.values()), clip],
            )
            # The budget is on the disk before the first gradient: a crash can only have recorded too much.
            reserved = reserve_training(job, config, prepared, plan, again, **attempt.about)
            if again is not None:
                self._resumed(job, here)
            # Of two processes at the same run the ledger has let one through, which alone may make the run's key.
            noise = self._correlated_noise(job, config, here, plan, received.spec, resumed=again is not None)
            told = promise(config, prepared)
        taken = 0

        def on_step(step: int, loss: float | None) -> None:
            nonlocal taken
            taken = step
            self._watch.site_step(here.site, step, config.train.local_steps, loss, told.epsilon if told else None)

        try:
            result = yield Lesson(
                model,
                state,
                prepared.train,
                prepared.groups,
                config,
                site=here.site,
                round=job.round,
                plan=plan,
                keys=prepared.keys,
                clip=clip,
                noise=noise,
                key=attempt.key,
                on_step=on_step,
                rule=rule,
                on_smaller=self._smaller(here.site),
            )
            personal = yield from self._personal(rule, known, received, prepared, model, config, job, here.site)
        except BaseException:
            if reserved is not None:
                # A step that broke off counts: how far it came is not known, and of one that was broken off before
                # nothing is. What cannot be settled counts whole.
                steps = min(taken + 1, reserved.steps) if again is None else reserved.steps
                with contextlib.suppress(UserError):
                    prepared.ledger.settle(reserved, steps, "failed")
            raise
        if reserved is not None:
            attempt.end()
            prepared.ledger.settle(reserved, reserved.steps, "released")
            told = promise(config, prepared)
        if result.clip is not None:
            here.context.state["clip"] = ConfigRecord({"run": job.run, "clip": result.clip})
        sent = rule.finish(result.state, received) if rule is not None else result.state
        remembered = {**(rule.remember() if rule is not None else {}), **_own_tensors(result.state), **personal}
        shared = sent.only(received.spec.select("share"))
        upload, owed = packed(shared, received, config, site=here.site, round=job.round, known=known)
        memory.keep(job.round, {**remembered, **owed})
        metrics: dict[str, float] = {"records": len(prepared.train), "steps": result.steps}
        if result.loss is not None:
            metrics["loss"] = result.loss
        answer = encode_answer("train", site=here.site, round=job.round, metrics=metrics, privacy=told, adapter=upload)
        kept.keep(received, answer)
        return answer, received

    def _refine(self, job: Job, config: RunConfig, here: _Here, content: RecordDict) -> tuple[RecordDict, AdapterState]:
        """The second answer of a round, made of what the training left behind: nothing is learned or spent anew."""
        prepared, model = self._site(job, config, here)
        received = self._receive(content, here.context, model)
        here.policy.require_tensors(received.spec.select("share"))
        known = self._memory(job, here).of(job.round)
        rule = self._rule(job, config, here.site, known)
        if rule is None or not known:
            raise UserError(f"site {here.site} does not remember its training of round {job.round}")
        shared = rule.refine(received).only(received.spec.select("share"))
        server = config.server
        answer = encode_answer(
            "refine",
            site=here.site,
            round=job.round,
            metrics={"records": len(prepared.train)},
            privacy=promise(config, prepared),
            adapter=encode_adapter(shared, wire=server.wire_dtype, code=server.entropy_coding),
        )
        return answer, received

    def _rule(self, job: Job, config: RunConfig, site: str, known: Mapping[str, AdapterState]) -> LocalRule | None:
        """What the run's strategy has this site do otherwise in the round.

        Raises :class:`UserError` for a strategy that is not installed here, or whose part here cannot be private.
        """
        train = config.train
        about = Training(
            site=site,
            round=job.round,
            steps=train.local_steps,
            lr=train.lr,
            momentum=train.momentum if train.optimizer == "sgd" else 0.0,
            private=config.privacy.enabled,
        )
        try:
            aggregator = create_aggregator(config.strategy, config.strategy_options)
        except UserError as error:
            raise UserError(f"{error}; a site needs the package that offers its part of the strategy") from None
        rule = aggregator.local(about, known)
        if rule is not None and config.privacy.enabled:
            if rule.needs_loss:
                raise UserError(
                    f"strategy `{config.strategy}` has a site choose by its training loss, which is not private"
                )
            if rule.personal() is not None:
                raise UserError(
                    f"strategy `{config.strategy}` trains a second adapter on the same records, for which no budget is "
                    "set aside; choose another, or set privacy.enabled = false"
                )
        return self._surroundings.rule(rule, config, about)

    @staticmethod
    def _loss(config: RunConfig, prepared: Prepared, model: Resident) -> Callable[[AdapterState], float]:
        """The mean training loss of an adapter, which only a run without privacy may make use of."""

        def loss(state: AdapterState) -> float:
            scores = evaluate(model, state, prepared.train, config)
            return float(scores.loss_sum.sum() / max(scores.examples.sum(), 1))

        return loss

    def _personal(
        self,
        rule: LocalRule | None,
        known: Mapping[str, AdapterState],
        received: AdapterState,
        prepared: Prepared,
        model: Resident,
        config: RunConfig,
        job: Job,
        site: str,
    ) -> Generator[Lesson, Trained, dict[str, AdapterState]]:
        """The adapter that stays here, trained beside the shared one where the strategy asks for it."""
        own = rule.personal() if rule is not None else None
        if own is None:
            return {}
        start = AdapterState(received.spec, {**received, **known.get(_PERSONAL, {})})
        # Batches of its own: under the shared training's name both would see the same ones.
        name = f"{site}/{_PERSONAL}"
        trained = yield Lesson(
            model,
            own.begin(start, None),
            prepared.train,
            prepared.groups,
            config,
            site=name,
            round=job.round,
            plan=None,
            rule=own,
            on_smaller=self._smaller(site),
        )
        return {_PERSONAL: trained.state.only(received.spec.bare.names)}

    def _evaluate(self, job: Job, config: RunConfig, here: _Here, content: RecordDict) -> RecordDict:
        prepared, model = self._site(job, config, here)
        known = self._memory(job, here).of(job.round)
        state = _with_local(self._receive(content, here.context, model), known)
        if _PERSONAL in known:
            state = AdapterState(state.spec, {**state, **known[_PERSONAL]})
        metrics: dict[str, float] = {}
        kept = self._kept("evaluate", job, config, here, prepared)
        if config.evaluation_release == "noised":
            if (repeated := self._repeated(kept, state, job, here)) is not None:
                return repeated
            kept.require_room(0)
            with self._attempt("evaluate", config, here) as attempt:
                metrics = self._noised_counts(job, config, here, prepared, model, state, attempt)
        elif config.evaluation_release == "exact_not_private":
            metrics = evaluate(model, state, prepared.held_out, config, on_smaller=self._smaller(here.site)).exact()
        privacy = promise(config, prepared)
        answer = encode_answer("evaluate", site=here.site, round=job.round, metrics=metrics, privacy=privacy)
        if config.evaluation_release == "noised":
            kept.keep(state, answer)
        return answer

    def _noised_counts(
        self,
        job: Job,
        config: RunConfig,
        here: _Here,
        prepared: Prepared,
        model: Resident,
        state: AdapterState,
        attempt: Attempt,
    ) -> dict[str, float]:
        """Evaluation counts that the budget of the held-out units has paid for."""
        event, again = planned(
            attempt,
            prepared,
            partial(event_of_release, job, config, prepared),
            lambda: _terms(job, config, here, state),
        )
        if again is not None:
            reserved = resume(config, prepared, again)
            self._resumed(job, here)
        else:
            reserved = reserve(job, config, prepared, event, "held-out", None, **attempt.about)
        scores = evaluate(model, state, prepared.held_out, config, on_smaller=self._smaller(here.site))
        if config.privacy.seeded_noise_not_private:
            stream = RandomStream.seeded_not_private(config.seed, here.site, job.round, "evaluation")
        else:
            stream = RandomStream.from_os() if attempt.key is None else RandomStream(attempt.key)
        even = model.task.even_loss(model.adapter.model)
        counts = noised(scores, prepared.held_out_groups, even, event.noise_multiplier, stream)
        attempt.end()
        prepared.ledger.settle(reserved, 1, "released")
        return counts

    def _correlated_noise(
        self, job: Job, config: RunConfig, here: _Here, plan: PrivacyPlan, spec: AdapterSpec, *, resumed: bool
    ) -> CorrelatedNoise | None:
        """The run's noise, where it is correlated: it goes on from round to round, also in another process.

        ``resumed``: a process that died may have begun it.
        """
        if plan.bands == 1:
            return None
        # The server chose the run's name, so no path is made of it.
        name = hashlib.sha256(job.run.encode()).hexdigest()[:16]
        names = [tensor.name for tensor in spec.tensors if tensor.parameter and tensor.policy != "freeze"]
        trained = hashlib.sha256("|".join(names).encode()).hexdigest()[:16]
        place = (str(here.folder), here.site, name, trained)
        if config.privacy.seeded_noise_not_private:
            key = seeded_key_not_private(config.seed, here.site, job.run)
        elif here.folder is None:
            raise UserError("privacy.bands above 1 needs a folder at the site, where the key of its noise is kept")
        else:
            path = here.folder / "noise" / f"{name}.json"
            # Also for noise that is held: the key's file knows under which plan the run was begun.
            about = {"bands": plan.bands, "slots": plan.slots, "first_step": plan.first_step}
            key = site_key(path, **about, trained=trained, resumed=resumed)
        if plan.first_step == 0 or place not in self._noise:
            self._noise[place] = plan.correlated(key)
            while len(self._noise) > _NOISES:
                self._noise.popitem(last=False)
        return self._noise[place]

    def _site(self, job: Job, config: RunConfig, here: _Here) -> tuple[Prepared, Resident]:
        site, policy, dataset = here.site, here.policy, here.dataset
        model = resident(config)
        if model.base.fingerprint != job.fingerprint:
            raise UserError(
                f"site {site} holds another base model (fingerprint {model.base.fingerprint[:12]}, the run's is "
                f"{job.fingerprint[:12]}); give every site the same files"
            )
        place = policy.data_path(dataset)
        # One process may serve runs that differ in nothing but where the site's data and ledger lie.
        key = (job.config, site, str(here.folder), dataset.name, str(place))
        if key not in self._encoded:
            # The data are those of the run, whatever else is written for this site alone.
            whole = config_from_json(job.config, "the server's configuration")
            version = (whole.digest(), config.model, config.method.rank)
            shared = self._sharing.get(version, lambda: sharing(config, model))
            policy.require_tensors(shared(site))
            with section("data"):
                data = self._surroundings.data(whole, site, place, here.context)
                self._encoded[key] = encode(config, data, model)
        encoded = self._encoded[key]
        ledger = self._of(here).get(
            ("ledger", *key),
            lambda: ledger_of(config, encoded, here.folder, dataset.name, durable=self._surroundings.durable),
        )
        prepared = Prepared(**vars(encoded), ledger=ledger, limits=tuple(policy.limits(dataset)))
        policy.require_units(len(prepared.train), prepared.patients, dataset)
        return prepared, model

    def _of(self, here: _Here) -> Recent[tuple[str, ...], Any]:
        """Where the ledger and the memory of a site are at hand."""
        return self._loose if here.folder is None else self._books

    def _receive(self, content: RecordDict, context: Context, model: Resident) -> AdapterState:
        """The global adapter of an instruction, completed from what this site holds, and held from now on."""
        table = decode_table(content, "the server")
        spec = model.adapter.spec
        held = (record_of(context.state, "held.digest", ConfigRecord) or ConfigRecord()).get("state")
        if table.rest and held != table.rest:
            raise _StateNotHeldError(f"the adapter {table.rest[:12]} that the instruction builds on is not held here")

        def received() -> tuple[AdapterState, Mapping[str, Any]]:
            rest = self._held(context, spec) if table.rest else None
            with section("wire"):
                state = decode_adapter(content, spec, sender="the server", held=rest)
            packed = encode_adapter(state, wire="fp32")
            digest = ConfigRecord({"state": table.state})
            return state, {"held.digest": digest, "held.adapter": packed["adapter"], "held.table": packed["table"]}

        state, records = self._states.get((table.state, table.spec), received)
        if held != table.state:
            for name, record in records.items():
                context.state[name] = record
        return state

    def _held(self, context: Context, spec: AdapterSpec) -> AdapterState:
        content = RecordDict({"adapter": context.state["held.adapter"], "table": context.state["held.table"]})
        return decode_adapter(content, spec, sender="this site's own memory")

    def _memory(self, job: Job, here: _Here) -> SiteMemory:
        key = ("memory", str(here.folder), here.site, job.run)
        return self._of(here).get(key, lambda: SiteMemory(here.folder, job.run))


def _terms(job: Job, config: RunConfig, here: _Here, *states: AdapterState) -> list[object]:
    """What an instruction says, and the states that it is about: all that decides what becomes of it, but the data."""
    about = [config.digest(), job.run, job.round, job.fingerprint, here.site]
    return [*about, *(f"{state.spec.digest}|{state.digest}" for state in states)]


def _with_local(state: AdapterState, known: Mapping[str, AdapterState]) -> AdapterState:
    """``state`` with this site's personal tensors in place of the initial ones."""
    own: Mapping[str, np.ndarray] = known.get(_LOCAL, {})
    kept = {name: own[name] for name in state.spec.select("local") if name in own}
    return AdapterState(state.spec, {**state, **kept}) if kept else state


def _own_tensors(state: AdapterState) -> dict[str, AdapterState]:
    """The personal tensors of ``state``, to be remembered."""
    names = state.spec.select("local")
    return {_LOCAL: state.only(names)} if names else {}


def _sendable(error: Exception, folder: Path | None) -> Exception:
    """``error`` as others may hear it: where a file lies at the site is the site's own affair."""
    if isinstance(error, NoPolicyError):
        return UserError(error.sent)
    if isinstance(error, PrivateError) or not isinstance(error, UserError) or folder is None:
        return error
    return UserError(str(error).replace(f"{folder}/", ""))
