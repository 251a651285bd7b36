"""The answer to an instruction to train, and what the site remembers of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from functools import partial

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.progress import Watch
from ..core.wire import Job, encode_adapter, encode_answer, record_of
from ..privacy.clipping import require_exact
from ..strategies import LocalRule, Training, create_aggregator
from .attempt import Attempt
from .budget import plan_of, planned, promise, reserve_training
from .devicememory import telling
from .evaluation import evaluate
from .holdings import Holdings
from .paid import Paid, terms
from .prepared import Prepared
from .resident import Resident
from .surroundings import Surroundings
from .trainer import Lesson, Trained
from .upload import packed
from .visit import Here

# What a site remembers beside what its strategy does, by name.
_LOCAL, PERSONAL = "site-local", "site-personal"


class Learning:
    """Answers with what a site learned."""

    def __init__(self, surroundings: Surroundings, holdings: Holdings, paid: Paid, watch: Watch) -> None:
        self._surroundings, self._holdings, self._paid, self._watch = surroundings, holdings, paid, watch

    def train(
        self, job: Job, config: RunConfig, here: Here, content: RecordDict, attempt: Attempt
    ) -> Generator[Lesson, Trained, tuple[RecordDict, AdapterState]]:
        """The answer of a training, and the adapter that it was about."""
        prepared, model = self._holdings.site(job, config, here)
        received = self._holdings.receive(content, here.context, model)
        here.policy.require_tensors(received.spec.select("share"))
        kept = self._paid.kept("train", job, config, here, prepared)
        if (repeated := self._paid.repeated(kept, received, job, here)) is not None:
            return repeated, received
        memory = self._holdings.memory(job, here)
        known = memory.before(job.round)
        state = with_local(received, known)
        rule = self.rule(job, config, here.site, known)
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
                lambda: [*terms(job, config, here, state, *known.values()), clip],
            )
            # The budget is on the disk before the first gradient: a crash can only have recorded too much.
            reserved = reserve_training(job, config, prepared, plan, again, **attempt.about)
            if again is not None:
                self._paid.resumed(job, here)
            # Of two processes at the same run the ledger has let one through, which alone may make the run's key.
            noise = self._holdings.noise(job, config, here, plan, received.spec, resumed=again is not None)
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
                on_smaller=telling(self._watch, here.site),
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

    def refine(self, job: Job, config: RunConfig, here: Here, content: RecordDict) -> tuple[RecordDict, AdapterState]:
        """The second answer of a round, made of what the training left behind: nothing is learned or spent anew."""
        prepared, model = self._holdings.site(job, config, here)
        received = self._holdings.receive(content, here.context, model)
        here.policy.require_tensors(received.spec.select("share"))
        known = self._holdings.memory(job, here).of(job.round)
        rule = self.rule(job, config, here.site, known)
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

    def rule(self, job: Job, config: RunConfig, site: str, known: Mapping[str, AdapterState]) -> LocalRule | None:
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
        start = AdapterState(received.spec, {**received, **known.get(PERSONAL, {})})
        # Batches of its own: under the shared training's name both would see the same ones.
        name = f"{site}/{PERSONAL}"
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
            on_smaller=telling(self._watch, site),
        )
        return {PERSONAL: trained.state.only(received.spec.bare.names)}


def with_local(state: AdapterState, known: Mapping[str, AdapterState]) -> AdapterState:
    """``state`` with this site's personal tensors in place of the initial ones."""
    own: Mapping[str, np.ndarray] = known.get(_LOCAL, {})
    kept = {name: own[name] for name in state.spec.select("local") if name in own}
    return AdapterState(state.spec, {**state, **kept}) if kept else state


def _own_tensors(state: AdapterState) -> dict[str, AdapterState]:
    """The personal tensors of ``state``, to be remembered."""
    names = state.spec.select("local")
    return {_LOCAL: state.only(names)} if names else {}
