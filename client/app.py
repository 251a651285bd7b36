"""The Flower ClientApp: an instruction in, an answer out, and nothing else leaves."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..core.adapter import AdapterSpec, AdapterState
from ..core.config import RunConfig, config_from_json
from ..core.errors import PrivateError, UserError, one_line
from ..core.progress import SILENT, Watch
from ..core.tasks import Example
from ..core.update import PrivacyStatement
from ..core.wire import (
    NEEDS_STATE,
    Job,
    Kind,
    decode_adapter,
    decode_job,
    decode_table,
    encode_adapter,
    encode_answer,
    encode_refusal,
)
from ..privacy.accounting import Event
from ..privacy.clipping import require_exact
from ..privacy.ledger import Ledger, Limit, Part, Reservation
from ..privacy.plan import PrivacyPlan, statement
from ..privacy.sampling import group_by_unit
from .data import SiteData, load_site
from .evaluation import evaluate
from .resident import Resident, resident
from .trainer import train

log = logging.getLogger("fedgraft.site")


class _StateNotHeldError(UserError):
    """The instruction builds on a global adapter that this site does not hold."""


@dataclass(frozen=True)
class Surroundings:
    """What a site's own machine supplies, and no instruction can: which site it is, its data, where it keeps records.

    ``folder``: the site's own folder, for its ledger; None keeps the ledger in memory (for tests).
    """

    name: Callable[[RunConfig, Context], str]
    data: Callable[[RunConfig, str, Context], SiteData]
    folder: Callable[[RunConfig, str, Context], Path | None]


@dataclass(frozen=True)
class _Prepared:
    """A site's encoded records and its privacy units."""

    train: list[Example]
    held_out: list[Example]
    groups: list[np.ndarray]
    ledger: Ledger
    split: str


class SiteClient:
    """The site's side of the conversation; one object serves every site of a process and keeps what is costly."""

    def __init__(self, surroundings: Surroundings, watch: Watch = SILENT) -> None:
        self._surroundings = surroundings
        self._watch = watch
        self._configs: OrderedDict[str, RunConfig] = OrderedDict()
        self._prepared: dict[tuple[str, ...], _Prepared] = {}
        # The global adapter as it was last received, shared by the sites of this process: decoded, and packed again.
        self._states: OrderedDict[tuple[str, str], tuple[AdapterState, RecordDict]] = OrderedDict()

    def answer(self, kind: Kind, message: Message, context: Context) -> Message:
        """Do what the instruction says; a failure becomes a one-line answer that names the site."""
        site, number = "?", 0
        try:
            job = decode_job(message.content)
            number = job.round
            config = self._config(job.config)
            site = self._surroundings.name(config, context)
            if job.site and job.site != site:
                raise UserError(f"this is site {site}, the instruction is for {job.site}")
            handler = {"hello": self._hello, "train": self._train, "evaluate": self._evaluate}[kind]
            content = handler(job, config, site, message.content, context)
        except _StateNotHeldError as error:
            content = encode_refusal(error, site=site, round=number, code=NEEDS_STATE)
        except Exception as error:
            log.error("site %s: %s", site, one_line(error), exc_info=not isinstance(error, UserError))
            if isinstance(error, PrivateError) or not isinstance(error, UserError):
                # The answer says less than this, and whoever watches sits at the site.
                self._watch.note(f"site {site}: {one_line(error)}")
            content = encode_refusal(error, site=site, round=number)
        self._watch.site_finished(kind, site)
        return Message(content, reply_to=message)

    def _hello(self, job: Job, config: RunConfig, site: str, content: RecordDict, context: Context) -> RecordDict:
        prepared, model = self._site(job, config, site, context)
        if config.privacy.enabled and job.round <= config.rounds:
            # Whatever would stop the run later must stop it now, before any site has spent anything.
            self._plan(job, config, prepared)
            require_exact(model.adapter.model, model.adapter.trainables())
        return encode_answer(
            "hello",
            site=site,
            round=job.round,
            metrics={
                "records": len(prepared.train),
                "held_out": len(prepared.held_out),
                "units": len(prepared.groups),
            },
            facts={
                "spec": model.adapter.spec.with_policy("share", lambda t: True).digest,
                "fingerprint": job.fingerprint,
            },
            privacy=self._promise(config, prepared),
        )

    def _train(self, job: Job, config: RunConfig, site: str, content: RecordDict, context: Context) -> RecordDict:
        prepared, model = self._site(job, config, site, context)
        state = self._with_local(self._receive(content, context, model), context)
        plan = promise = reserved = None
        if config.privacy.enabled:
            plan = self._plan(job, config, prepared)
            require_exact(model.adapter.model, model.adapter.trainables())
            # The budget is on the disk before the first gradient: a crash can only have recorded too much.
            reserved = self._reserve(job, config, prepared, plan.event(config.train.local_steps), "train")
            promise = self._promise(config, prepared)
        taken = 0

        def on_step(step: int, loss: float | None) -> None:
            nonlocal taken
            taken = step
            self._watch.site_step(site, step, config.train.local_steps, loss, promise.epsilon if promise else None)

        try:
            result = train(
                model,
                state,
                prepared.train,
                prepared.groups,
                config,
                site=site,
                round=job.round,
                plan=plan,
                on_step=on_step,
            )
        except BaseException:
            if reserved is not None:
                # A step that broke off counts: how far it came is not known. What cannot be settled counts whole.
                with contextlib.suppress(UserError):
                    prepared.ledger.settle(reserved, min(taken + 1, reserved.steps), "failed")
            raise
        if reserved is not None:
            prepared.ledger.settle(reserved, reserved.steps, "released")
            promise = self._promise(config, prepared)
        self._keep_local(result.state, context)
        metrics: dict[str, float] = {"records": len(prepared.train), "steps": result.steps}
        if result.loss is not None:
            metrics["loss"] = result.loss
        shared = result.state.only(result.state.spec.select("share"))
        return encode_answer(
            "train",
            site=site,
            round=job.round,
            metrics=metrics,
            privacy=promise,
            adapter=encode_adapter(shared, wire=config.server.wire_dtype),
        )

    def _evaluate(self, job: Job, config: RunConfig, site: str, content: RecordDict, context: Context) -> RecordDict:
        prepared, model = self._site(job, config, site, context)
        state = self._with_local(self._receive(content, context, model), context)
        metrics: dict[str, float] = {}
        if config.evaluation_release != "none":
            metrics = evaluate(model, state, prepared.held_out, config).exact()
        privacy = self._promise(config, prepared)
        return encode_answer("evaluate", site=site, round=job.round, metrics=metrics, privacy=privacy)

    def _reserve(
        self, job: Job, config: RunConfig, prepared: _Prepared, events: Event | tuple[Event, ...], part: Part
    ) -> Reservation:
        """Set budget aside for ``events``, within what the job allows."""
        privacy = config.privacy
        return prepared.ledger.reserve(
            events,
            part=part,
            split=prepared.split,
            limits=(_own_limit(config),),
            private_noise=not privacy.seeded_noise_not_private,
            run=job.run,
            round=job.round,
            delta=privacy.delta,
        )

    def _promise(self, config: RunConfig, prepared: _Prepared) -> PrivacyStatement | None:
        """Said with every answer, so that the steps of a training that was lost are counted where people look."""
        ledger = prepared.ledger
        if not config.privacy.enabled or not ledger.events():
            return None
        limit = _own_limit(config)
        trained = ledger.spent("train", prepared.split)
        told = statement(config, trained) if trained else PrivacyStatement(enabled=True, unit=config.privacy.unit)
        return replace(
            told,
            # Held-out people may have paid more for the evaluations than the others for the training.
            epsilon=ledger.total(limit.delta, prepared.split, neighbours=limit.neighbours, accountant=limit.accountant),
            delta=limit.delta,
            clip=config.privacy.clip,
            private_noise=told.private_noise and ledger.private_noise(),
            metrics=config.evaluation_release,
            ledger=ledger.head,
        )

    def _config(self, text: str) -> RunConfig:
        if text not in self._configs:
            self._configs[text] = config_from_json(text, "the server's configuration")
            while len(self._configs) > 2:
                self._configs.popitem(last=False)
        return self._configs[text]

    def _site(self, job: Job, config: RunConfig, site: str, context: Context) -> tuple[_Prepared, Resident]:
        model = resident(_own_version(config, site))
        if model.base.fingerprint != job.fingerprint:
            raise UserError(
                f"site {site} holds another base model (fingerprint {model.base.fingerprint[:12]}, the run's is "
                f"{job.fingerprint[:12]}); give every site the same files"
            )
        folder = self._surroundings.folder(config, site, context)
        # One process may serve runs that differ in nothing but where the site's data and ledger lie.
        key = (job.config, site, str(folder), str(context.node_config.get("data-path", "")))
        if key not in self._prepared:
            data = self._surroundings.data(config, site, context)
            task, processor = model.task, model.base.processor
            by_patient = config.privacy.enabled and config.privacy.unit == "patient"
            if by_patient and data.train.patients is None:
                raise UserError(f"site {site}: the privacy unit is the patient, but its records name none")
            self._prepared[key] = _Prepared(
                train=task.encode(data.train.inputs, _labels(data.train.labels), processor),
                held_out=task.encode(data.held_out.inputs, _labels(data.held_out.labels), processor),
                groups=group_by_unit(data.train.patients if by_patient else None, len(data.train)),
                ledger=Ledger(folder / "ledgers" if folder else None, data.fingerprint, unit=config.privacy.unit),
                split=_split(config, data),
            )
        return self._prepared[key], model

    def _plan(self, job: Job, config: RunConfig, prepared: _Prepared) -> PrivacyPlan:
        remaining = (config.rounds - max(job.round, 1) + 1) * config.train.local_steps
        spent = prepared.ledger.spent("train", prepared.split)
        try:
            return PrivacyPlan.for_run(config, len(prepared.groups), remaining, spent)
        except UserError as error:
            if not spent or job.round < 2:
                raise
            raise UserError(f"{error}; or end the run as it is: --resume with --set rounds={job.round - 1}") from None

    def _receive(self, content: RecordDict, context: Context, model: Resident) -> AdapterState:
        """The global adapter of an instruction, completed from what this site holds, and held from now on."""
        table = decode_table(content, "the server")
        spec = model.adapter.spec
        held = context.state.config_records.get("held.digest", ConfigRecord()).get("state")
        if table.rest and held != table.rest:
            raise _StateNotHeldError(f"the adapter {table.rest[:12]} that the instruction builds on is not held here")
        key = (table.state, table.spec)
        if key not in self._states:
            rest = self._held(context, spec) if table.rest else None
            state = decode_adapter(content, spec, sender="the server", held=rest)
            self._states[key] = (state, encode_adapter(state, wire="fp32"))
            while len(self._states) > 2:
                self._states.popitem(last=False)
        state, packed = self._states[key]
        if held != table.state:
            context.state["held.digest"] = ConfigRecord({"state": table.state})
            context.state["held.adapter"] = packed["adapter"]
            context.state["held.table"] = packed["table"]
        return state

    def _held(self, context: Context, spec: AdapterSpec) -> AdapterState:
        content = RecordDict({"adapter": context.state["held.adapter"], "table": context.state["held.table"]})
        return decode_adapter(content, spec, sender="this site's own memory")

    def _with_local(self, state: AdapterState, context: Context) -> AdapterState:
        """``state`` with this site's personal tensors in place of the initial ones."""
        kept = context.state.array_records.get("local")
        names = state.spec.select("local")
        if kept is None or not names:
            return state
        return AdapterState(state.spec, {**state, **{name: kept[name].numpy() for name in names}})

    def _keep_local(self, state: AdapterState, context: Context) -> None:
        names = state.spec.select("local")
        if names:
            context.state["local"] = ArrayRecord({name: Array(np.array(state[name])) for name in names})


def _own_version(config: RunConfig, site: str) -> RunConfig:
    """The configuration with what is written for this site alone."""
    own = next((entry for entry in config.data.sites if entry.name == site), None)
    if own is None or not (own.model or own.rank):
        return config
    method = config.method.model_copy(update={"rank": own.rank or config.method.rank})
    return config.model_copy(update={"model": own.model or config.model, "method": method})


def _own_limit(config: RunConfig) -> Limit:
    """What the job itself promises."""
    privacy = config.privacy
    return Limit(
        privacy.epsilon,
        privacy.delta,
        f"the job's privacy.epsilon {privacy.epsilon:g}",
        neighbours=privacy.neighbours,
        accountant=privacy.accountant,
    )


def _split(config: RunConfig, data: SiteData) -> str:
    """A name for the way patients were told apart: under one name nobody is in two parts, whatever else changes.

    Where no key names the patients, that is known of one state of the data alone.
    """
    key = data.fingerprint[:16] if data.train.patients is None else f"column {config.data.patient_column}"
    return f"{data.split}, site {data.site}, by {key}"


def _labels(labels: np.ndarray | None) -> list[int] | None:
    return None if labels is None else labels.tolist()


def make_client_app(surroundings: Surroundings, watch: Watch = SILENT) -> ClientApp:
    """A ClientApp whose sites are what ``surroundings`` says."""
    app = ClientApp()
    client = SiteClient(surroundings, watch)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return client.answer("hello", message, context)

    @app.train()
    def local_training(message: Message, context: Context) -> Message:
        return client.answer("train", message, context)

    @app.evaluate()
    def local_evaluation(message: Message, context: Context) -> Message:
        return client.answer("evaluate", message, context)

    return app


def own_name(config: RunConfig, context: Context) -> str:
    """The site's name from its node configuration: ``site``, or its position among the run's sites."""
    node = context.node_config
    if "site" in node:
        return str(node["site"])
    position = node.get("partition-id")
    if not isinstance(position, int) or not 0 <= position < len(config.site_names):
        raise UserError(
            f'the node configuration names no site: give site="NAME" or a partition-id below {len(config.site_names)}'
        )
    return config.site_names[position]


def _own_folder(config: RunConfig, site: str, context: Context) -> Path:
    folder = context.node_config.get("site-folder")
    if not folder:
        raise UserError(f'site {site}: give site-folder="FOLDER" in the node configuration; the ledger lies there')
    return Path(str(folder))


def _own_data(config: RunConfig, site: str, context: Context) -> SiteData:
    return load_site(config, site, str(context.node_config.get("data-path", "")))


#: The ClientApp of a real site: its name, data and folder come from its own node configuration.
app = make_client_app(Surroundings(own_name, _own_data, _own_folder))
