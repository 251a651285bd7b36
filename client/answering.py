"""The site's side of the conversation: an instruction in, an answer out, and nothing else leaves."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig, config_from_json
from ..core.errors import PrivateError, UserError, one_line
from ..core.profile import section
from ..core.progress import SILENT, Watch
from ..core.wire import (
    NEEDS_STATE,
    STEPS,
    Job,
    Kind,
    decode_adapter,
    decode_answer,
    decode_job,
    encode_answer,
    encode_masked,
    encode_refusal,
)
from ..privacy.clipping import require_exact
from ..privacy.ledger import OverspentError
from ..privacy.securesum import SecureSite, Terms
from .budget import event_of_release, plan_of, promise, require_room
from .cohort import Cohort
from .counting import Counting
from .devicememory import telling
from .gate import left, require_allowed, require_masked, require_refusal, require_step
from .holdings import Holdings, StateNotHeldError
from .job import own_version
from .learning import Learning
from .paid import Paid
from .policy import NoPolicyError, PolicyError
from .securing import SecureSums, envelopes_of, mask
from .surroundings import Surroundings
from .together import train_together
from .trainer import Lesson, Trained, require_memory
from .visit import Here, Visit

log = logging.getLogger("fedgraft.site")


#: What answering takes: it may ask for trainings, and ends with what is sent.
Course = Generator[Lesson, Trained, RecordDict]


def _require_round(kind: Kind, job: Job, config: RunConfig) -> None:
    """Raise :class:`UserError` for a round that the run does not have: plans and schedules know nothing of it."""
    first, last = int(kind not in ("hello", "evaluate")), config.rounds + (kind == "hello")
    if not first <= job.round <= last:
        raise UserError(f"the run has no round {job.round} to {kind}: it has {config.rounds}; set rounds")


class SiteClient:
    """The site's side of the conversation; one object serves every site of a process and keeps what is costly."""

    def __init__(self, surroundings: Surroundings, watch: Watch = SILENT, cohort: Cohort | None = None) -> None:
        self._surroundings = surroundings
        self._watch = watch
        self._cohort = cohort or Cohort()
        self._cohort.on_decision = lambda decision: watch.cohort_found(decision.size, decision.text)
        self._holdings = Holdings(surroundings)
        self._paid = Paid(surroundings.keeps, watch)
        self._learning = Learning(surroundings, self._holdings, self._paid, watch)
        self._counting = Counting(self._holdings, self._paid, watch)
        self._sums = SecureSums(durable=surroundings.durable)
        # Decisions that are in the audit log already: the policy and the job have not changed since.
        self._admitted: set[tuple[str, ...]] = set()

    def answer(self, kind: Kind, message: Message, context: Context) -> Message:
        """Do what the instruction says; a failure becomes a one-line answer that names the site."""
        return self.answer_together(kind, [(message, context)])[0]

    def answer_together(self, kind: Kind, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The answers of several sites of this process, whose trainings may share their passes through the base model.

        Each site decides, spends, passes its gate and writes its audit log as if it were alone.
        """
        visits = [Visit(kind, self._surroundings.durable) for _ in calls]
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

    def _concluded(self, visit: Visit, content: RecordDict | Exception) -> RecordDict:
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

    def _answered(self, visit: Visit, content: RecordDict, context: Context) -> Course:
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
        here = visit.here = Here(site, folder, context, policy, dataset)
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
            with self._paid.attempt("train", config, here) as attempt:
                answer, received = yield from self._learning.train(job, config, here, content, attempt)
        elif visit.kind == "refine":
            answer, received = self._learning.refine(job, config, here, content)
        else:
            handler = self._hello if visit.kind == "hello" else self._counting.evaluate
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

    def _secure(self, kind: Kind, job: Job, config: RunConfig, here: Here) -> SecureSite | None:
        """This site's side of the secure sum that an instruction of ``kind`` belongs to; None where to none."""
        if not config.secure_sum.enabled and kind in STEPS:
            raise UserError("the run has no secure sum (secure_sum.enabled = false)")
        if not config.secure_sum.enabled or kind == "evaluate":
            return None
        if kind == "refine":
            raise UserError("the run has a secure sum, and a second answer would be in the open; nothing is sent")
        identity = self._surroundings.identity(config, here.site, here.folder, here.context)
        return self._sums.open(job, config, here.site, here.folder, identity)

    def _step(self, kind: Kind, job: Job, here: Here, secure: SecureSite, content: RecordDict) -> RecordDict:
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
        here: Here,
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

    def _refusal(self, error: Exception, visit: Visit) -> RecordDict:
        log.error("site %s: %s", visit.site, one_line(error), exc_info=not isinstance(error, UserError))
        if isinstance(error, PrivateError) or not isinstance(error, UserError):
            # The answer says less than this, and whoever watches sits at the site.
            self._watch.note(f"site {visit.site}: {one_line(error)}")
        code = NEEDS_STATE if isinstance(error, StateNotHeldError) else ""
        number = visit.job.round if visit.job is not None else 0
        content = encode_refusal(_sendable(error, visit.folder), site=visit.site, round=number, code=code)
        require_refusal(content)
        return content

    def _reason(self, error: Exception, visit: Visit) -> dict[str, Any]:
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

    def _hello(self, job: Job, config: RunConfig, here: Here, content: RecordDict) -> RecordDict:
        prepared, model = self._holdings.site(job, config, here)
        self._learning.rule(job, config, here.site, {})  # a site that cannot do its part says so now
        if config.secure_sum.enabled:
            Terms.of(config, job.run, job.round).ring.require_weight(len(prepared.train))
        if job.round <= config.rounds:
            smaller = telling(self._watch, here.site)
            require_memory(model, prepared.train, config, private=config.privacy.enabled, on_smaller=smaller)
        if config.privacy.enabled:
            # Whatever would stop the run later must stop it now, before any site has spent anything.
            train = self._paid.unpaid("train", job, config, here, prepared)
            evaluation = self._paid.unpaid("evaluate", job, config, here, prepared)
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


def _sendable(error: Exception, folder: Path | None) -> Exception:
    """``error`` as others may hear it: where a file lies at the site is the site's own affair."""
    if isinstance(error, NoPolicyError):
        return UserError(error.sent)
    if isinstance(error, PrivateError) or not isinstance(error, UserError) or folder is None:
        return error
    return UserError(str(error).replace(f"{folder}/", ""))
