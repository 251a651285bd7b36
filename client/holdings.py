"""What a process holds of its sites from one instruction to the next: data, ledgers, memories, noise, adapters."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict

from ..core.adapter import AdapterSpec, AdapterState
from ..core.config import RunConfig, config_from_json
from ..core.errors import UserError
from ..core.profile import section
from ..core.recent import Recent
from ..core.wire import Job, decode_adapter, decode_table, encode_adapter, record_of
from ..privacy.correlated import CorrelatedNoise, seeded_key_not_private, site_key
from ..privacy.plan import PrivacyPlan
from .job import sharing
from .memory import SiteMemory
from .prepared import Encoded, Prepared, encode, ledger_of
from .resident import Resident, resident
from .surroundings import Surroundings
from .visit import Here

_NOISES = 8
_BOOKS = 32
_VERSIONS = 16


class StateNotHeldError(UserError):
    """The instruction builds on a global adapter that this site does not hold."""


class Holdings:
    """What one process holds of the sites that it answers for, as ``surroundings`` says; all of it can be had anew."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._encoded: dict[tuple[str, ...], Encoded] = {}
        self._sharing: Recent[tuple[str | int, ...], Callable[[str], tuple[str, ...]]] = Recent(_VERSIONS)
        # Ledgers and memories: those of the last sites, since files hold what they know; those of sites without a
        # folder (in tests) are all there is.
        self._books: Recent[tuple[str, ...], Any] = Recent(_BOOKS)
        self._loose: Recent[tuple[str, ...], Any] = Recent(None)
        # Correlated noise goes on from round to round; its last rows are kept, or would have to be drawn anew.
        self._noise: OrderedDict[tuple[str, ...], CorrelatedNoise] = OrderedDict()
        # The global adapter as it was last received, shared by the sites of this process: decoded, and as it is held.
        self._states: Recent[tuple[str, str], tuple[AdapterState, Mapping[str, Any]]] = Recent(2)

    def site(self, job: Job, config: RunConfig, here: Here) -> tuple[Prepared, Resident]:
        """The site's encoded records with their ledger, and the model. Raises :class:`UserError` for another one."""
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

    def memory(self, job: Job, here: Here) -> SiteMemory:
        """What the site remembers of the run."""
        key = ("memory", str(here.folder), here.site, job.run)
        return self._of(here).get(key, lambda: SiteMemory(here.folder, job.run))

    def receive(self, content: RecordDict, context: Context, model: Resident) -> AdapterState:
        """The global adapter of an instruction, completed from what this site holds, and held from now on."""
        table = decode_table(content, "the server")
        spec = model.adapter.spec
        held = (record_of(context.state, "held.digest", ConfigRecord) or ConfigRecord()).get("state")
        if table.rest and held != table.rest:
            raise StateNotHeldError(f"the adapter {table.rest[:12]} that the instruction builds on is not held here")

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

    def noise(
        self, job: Job, config: RunConfig, here: Here, plan: PrivacyPlan, spec: AdapterSpec, *, resumed: bool
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

    def _held(self, context: Context, spec: AdapterSpec) -> AdapterState:
        content = RecordDict({"adapter": context.state["held.adapter"], "table": context.state["held.table"]})
        return decode_adapter(content, spec, sender="this site's own memory")

    def _of(self, here: Here) -> Recent[tuple[str, ...], Any]:
        """Where the ledger and the memory of a site are at hand."""
        return self._loose if here.folder is None else self._books
