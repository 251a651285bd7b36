"""What an instruction may spend of the people's privacy at this site, and what the site says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from ..core.wire import Job
from ..privacy.accounting import Event
from ..privacy.ledger import Entry, Limit, Part, Reservation
from ..privacy.plan import PrivacyPlan, statement
from ..privacy.release import release_event
from .attempt import Attempt, digest_of
from .prepared import Prepared

#: What is to be spent.
Planned = TypeVar("Planned", PrivacyPlan, Event)


def plan_of(job: Job, config: RunConfig, prepared: Prepared, without: str = "") -> PrivacyPlan:
    """The plan for the rest of the run; ``without``: as if the reservation of that name were not there."""
    remaining = (config.rounds - max(job.round, 1) + 1) * config.train.local_steps
    spent = prepared.ledger.spent("train", prepared.split, without)
    try:
        first = prepared.ledger.steps_reserved(job.run, without)
        return PrivacyPlan.for_run(config, len(prepared.groups), remaining, spent, first)
    except UserError as error:
        if not spent or job.round < 2:
            raise
        raise UserError(f"{error}; or end the run as it is: --resume with --set rounds={job.round - 1}") from None


def event_of_release(job: Job, config: RunConfig, prepared: Prepared, without: str = "") -> Event:
    try:
        return release_event(config, job.round, prepared.ledger.spent("held-out", prepared.split, without))
    except UserError as error:
        raise UserError(f'the evaluation: {error}; or say evaluate.release = "none"') from None


def planned(
    attempt: Attempt, prepared: Prepared, plan: Callable[[str], Planned], terms: Callable[[], Sequence[object]]
) -> tuple[Planned, Entry | None]:
    """What ``plan`` says, and the reservation that ``attempt`` takes up again; None: it has begun, and needs one.

    ``plan``: gives what is to be spent, as if the reservation of a name were not there; ``terms``: gives what the
    attempt hangs on beside that, its randomness and the site's data.
    """

    def digest(planned: Planned) -> str:
        return digest_of(*terms(), prepared.ledger.dataset, prepared.fingerprint, prepared.split, planned)

    if (entry := attempt.abandoned(prepared.ledger)) is not None:
        again = plan(entry.id)
        if attempt.resume(digest(again)):
            return again, entry
    first = plan("")
    attempt.begin(lambda: digest(first))
    return first, None


def resume(config: RunConfig, prepared: Prepared, entry: Entry) -> Reservation:
    """Take ``entry`` up again, within what the job and the site's policy allow."""
    limits = (own_limit(config), *prepared.limits)
    return prepared.ledger.resume(entry.id, split=prepared.split, limits=limits)


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


def reserve_training(
    job: Job, config: RunConfig, prepared: Prepared, plan: PrivacyPlan, resumed: Entry | None = None, **about: str
) -> Reservation:
    """Set a round's budget aside, or take up again what was: ``resumed``.

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
    if resumed is not None:
        reserved = resume(config, prepared, resumed)
    else:
        reserved = reserve(job, config, prepared, events[0] if own else events, "train", steps, **terms, **about)
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
