"""What an instruction may spend of the people's privacy at this site, and what the site says of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from ..core.wire import Job
from ..privacy.accounting import Event
from ..privacy.ledger import Limit, Part, Reservation
from ..privacy.plan import PrivacyPlan, statement
from ..privacy.release import release_event
from .prepared import Prepared


def plan_of(job: Job, config: RunConfig, prepared: Prepared) -> PrivacyPlan:
    remaining = (config.rounds - max(job.round, 1) + 1) * config.train.local_steps
    spent = prepared.ledger.spent("train", prepared.split)
    try:
        first = prepared.ledger.steps_reserved(job.run)
        return PrivacyPlan.for_run(config, len(prepared.groups), remaining, spent, first)
    except UserError as error:
        if not spent or job.round < 2:
            raise
        raise UserError(f"{error}; or end the run as it is: --resume with --set rounds={job.round - 1}") from None


def event_of_release(job: Job, config: RunConfig, prepared: Prepared) -> Event:
    try:
        return release_event(config, job.round, prepared.ledger.spent("held-out", prepared.split))
    except UserError as error:
        raise UserError(f'the evaluation: {error}; or say evaluate.release = "none"') from None


def reserve(
    job: Job,
    config: RunConfig,
    prepared: Prepared,
    events: Event | tuple[Event, ...],
    part: Part,
    steps: int | None = None,
    **about: str,
) -> Reservation:
    """Set budget aside for ``events``, within what the job and the site's policy allow."""
    privacy = config.privacy
    return prepared.ledger.reserve(
        events,
        part=part,
        split=prepared.split,
        limits=(own_limit(config), *prepared.limits),
        private_noise=not privacy.seeded_noise_not_private,
        steps=steps,
        run=job.run,
        round=job.round,
        delta=privacy.delta,
        **about,
    )


def reserve_training(job: Job, config: RunConfig, prepared: Prepared, plan: PrivacyPlan) -> Reservation:
    """Set a round's budget aside.

    Raises :class:`UserError` when another process is at work on the same run, and where units come in turn but the run
    was begun under other settings: a unit whose turn was paid for and is over would have another one for nothing.
    """
    steps = config.train.local_steps
    terms = {"terms": _terms(config, plan)} if plan.slots > 1 else {}
    if terms and any(entry.about.get("terms") != terms["terms"] for entry in prepared.ledger.training(job.run)):
        raise UserError(
            f"run {job.run} was begun under other settings or data; with units that come in turn (privacy.sampler, "
            "privacy.bands) it goes on as it was begun or not at all; begin a new run"
        )
    events = plan.events(plan.first_step, steps)
    # Steps in turn share what they cost; only steps that cost their own can be given back.
    own = len(events) == 1 and plan.slots == 1
    reserved = reserve(job, config, prepared, events[0] if own else events, "train", steps, **terms)
    if reserved.first_step != plan.first_step:
        raise UserError("another process of this site trains the same run; end one of them")
    return reserved


def _terms(config: RunConfig, plan: PrivacyPlan) -> str:
    """SHA-256 of all that decides whose turn it is, and of the rest of the configuration but how long the run is."""
    same = config.model_copy(update={"rounds": 1, "name": ""})
    return hashlib.sha256(f"{same.digest()}|{plan.slots}".encode()).hexdigest()


def require_room(prepared: Prepared, events: Event | tuple[Event, ...], part: Part) -> None:
    """Raise, with nothing spent, unless the site's policy leaves room for ``events``."""
    prepared.ledger.require_room(events, part=part, split=prepared.split, limits=prepared.limits)


def promise(config: RunConfig, prepared: Prepared) -> PrivacyStatement | None:
    """Said with every answer, so that the steps of a training that was lost are counted where people look."""
    ledger = prepared.ledger
    if not config.privacy.enabled or not ledger.events():
        return None
    limit = own_limit(config)
    trained = ledger.spent("train", prepared.split)
    told = statement(config, trained) if trained else PrivacyStatement(enabled=True, unit=config.privacy.unit)
    return replace(
        told,
        steps=ledger.steps_spent("train", prepared.split),
        # Held-out people may have paid more for the evaluations than the others for the training.
        epsilon=ledger.total(limit.delta, prepared.split, neighbours=limit.neighbours, accountant=limit.accountant),
        delta=limit.delta,
        clip=config.privacy.clip,
        private_noise=told.private_noise and ledger.private_noise(),
        metrics=config.evaluation_release,
        ledger=ledger.head,
    )


def own_limit(config: RunConfig) -> Limit:
    """What the job itself promises."""
    privacy = config.privacy
    return Limit(
        privacy.epsilon,
        privacy.delta,
        f"the job's privacy.epsilon {privacy.epsilon:g}",
        neighbours=privacy.neighbours,
        accountant=privacy.accountant,
    )
