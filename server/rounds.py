"""The rounds of a federation, over any Flower Grid: join, train, aggregate, evaluate, checkpoint, resume."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from .. import __version__
from ..core.adapter import AdapterState
from ..core.basemodel import BaseModel
from ..core.config import RunConfig
from ..core.errors import UserError, one_line
from ..core.profile import section
from ..core.progress import SILENT, Watch
from ..core.recent import Recent
from ..core.tasks import create_task
from ..core.wire import FAULTS, Answer, Job, decode_answer
from ..methods import attach, create_method
from ..methods.principal import principal_factors
from ..privacy.ledger import Ledger
from ..privacy.noise import RandomStream
from ..strategies import Aggregator, Training
from ..strategies.central import CentralPrivacy
from ..strategies.compose import compose
from ..strategies.flower import PeftStrategy
from ..strategies.lateness import require_same_tensors
from ..strategies.secure_sum import SecureSumStrategy, told
from . import checkpoints
from .checkpoints import Checkpoint
from .files import write_folder
from .onlooker import NOBODY, Onlooker
from .report import write_report
from .rundir import RunDirectory, each_metric, now
from .tally import Tally
from .validation import make_score

#: The site that a node's key stands for; empty where it stands for none.
Registered = Callable[[int], str]
_POLL = 0.5
_RANKS = 64
#: More missing sites than these are told of in one line.
_NAMED = 8


def check(config: RunConfig) -> Aggregator:
    """Refuse what cannot work before anything is loaded; returns the run's aggregator.

    Raises :class:`UserError` for an unknown strategy, option, method or task, ranks that the strategy cannot mix, or
    central privacy that cannot be kept.
    """
    aggregator = compose(config)
    method = create_method(config.method.name)
    create_task(config.task)
    if config.train.gradient_checkpointing and not method.recomputes:
        raise UserError(
            f"train.gradient_checkpointing runs layers a second time, and method {method.name} would compute something "
            "else then: switch that off, or choose another method"
        )
    if config.central.enabled:
        _central(aggregator, config, Ledger(None, unit="site"))
    elif config.central.sampling_rate < 1:
        raise UserError(
            f"central.sampling_rate is {config.central.sampling_rate:g} but central.enabled is false: sites are drawn "
            "by chance for central privacy alone; switch it on, or leave the rate at 1"
        )
    return aggregator


def _central(aggregator: Aggregator, config: RunConfig, ledger: Ledger) -> CentralPrivacy:
    """Central privacy around ``aggregator``, with randomness of the operating system's unless the run forgoes it."""

    def randomness(round: int, purpose: str) -> RandomStream:
        if config.central.seeded_noise_not_private:
            return RandomStream.seeded_not_private("central", config.seed, round, purpose)
        return RandomStream.from_os()

    return CentralPrivacy(aggregator, config, ledger, randomness)


def tell(watch: Watch, line: dict[str, Any]) -> None:
    """Show ``watch`` a line of metrics.jsonl, and each site that is missing in it, or late."""
    watch.phase_finished(line)
    for late in line.get("late", ())[:_NAMED]:
        fate = (
            f"is not used: {late['why']}"
            if late["why"]
            else f"counts now, {late['age']} round{'s' * (late['age'] > 1)} late"
        )
        watch.note(f"round {line['round']}: the result of {late['site']} of round {late['round']} {fate}")
    missing, faults = line["missing"], list(line.get("faults", {}).values())
    if len(missing) > _NAMED:
        kinds = counted({fault: faults.count(fault) for fault in FAULTS})
        watch.note(f"round {line['round']}: {len(missing)} sites are missing ({kinds}); metrics.jsonl names them")
        return
    for site, reason in missing.items():
        watch.note(f"round {line['round']}: {site} is missing: {reason.removeprefix(f'{site}: ')}")


def counted(faults: Mapping[str, int]) -> str:
    """``3 absent, 1 late``."""
    return ", ".join(f"{count} {fault}" for fault, count in faults.items() if count)


class Federation:
    """One run from its first join to its report.

    ``grid``: Flower's, or a simulation's; ``rundir``: new, or with ``resume`` one that holds checkpoints; ``onlooker``:
    what a simulation adds to the record; ``registered``: where nodes have keys, so that no site can pass for another.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        rundir: RunDirectory,
        *,
        engine: str,
        resume: bool,
        watch: Watch = SILENT,
        onlooker: Onlooker = NOBODY,
        registered: Registered | None = None,
    ) -> None:
        self.grid = grid
        self.config = config
        self.rundir = rundir
        self.watch = watch
        self.onlooker = onlooker
        self.engine = engine
        self.registered = registered
        self.aggregator = check(config)
        self.central: CentralPrivacy | None = None
        if config.central.enabled:
            self.central = _central(self.aggregator, config, Ledger(rundir.central_ledger, unit="site"))
        self._rule: Aggregator = self.central or self.aggregator
        self.started = time.monotonic()
        self.facts: dict[str, dict[str, float]] = {}
        self._tally = Tally()
        self._digests: Recent[int, str] = Recent(_RANKS)
        self._noted: set[str] = set()
        task = create_task(config.task)
        with section("load"):
            self.base: BaseModel = task.load(config.model, config.task, config.seed)
            self.adapter = attach(self.base, config.method, task, config.seed)
        if self.aggregator.capabilities.needs_validation:
            self._rule.score = make_score(config, self.base, self.adapter, task)
        self.run = self._resumed() if resume else self._fresh()
        state = self.checkpoint.state
        require_same_tensors(self._rule, state, config)
        kind = SecureSumStrategy if config.secure_sum.enabled else PeftStrategy
        self.strategy = kind(self._rule, state, config, run=self.run["run"], fingerprint=self.base.fingerprint)
        if self._rule.score is None:
            # The tensors live in `state` now; the sites load a model of their own.
            self.base.model.to("meta")

    def _fresh(self) -> dict[str, Any]:
        fresh = self.adapter.load_peft(self.config.start_from) if self.config.start_from else self.adapter.read()
        self._rule.principal = partial(principal_factors, self.adapter)
        self.checkpoint = Checkpoint(0, self._rule.prepare(fresh))
        self._require_uploads(self.checkpoint.state)
        self._require_steady(self.checkpoint.state)
        self._past_seconds = 0.0
        run = {"run": uuid.uuid4().hex[:12], "started": now(), "resumed": []}
        checkpoints.save(
            self.rundir.checkpoints, self.checkpoint, self.config.digest(), self.config.server.keep_checkpoints
        )
        return run

    def _require_uploads(self, state: AdapterState) -> None:
        """Raise :class:`UserError` where a lossy upload could not carry what the sites are to send."""
        form = self.config.server.upload
        spec = self._rule.for_site(state, self.config.site_names[0]).spec
        odd = [name for name in spec.select("share") if spec.by_name[name].dtype != "float32"]
        if form != "plain" and odd:
            raise UserError(f'server.upload "{form}" is for float32 tensors, which {odd[0]} is not; set it to "plain"')

    def _require_steady(self, state: AdapterState) -> None:
        """Raise :class:`UserError` where correlated noise would meet tensors that train in some steps only."""
        site, train = self.config.site_names[0], self.config.train
        if self.config.privacy.bands == 1 or not self.config.privacy.enabled:
            return
        found = set()
        for number in (1, 2):
            self._rule.round = number
            spec = self._rule.for_site(state, site).spec
            all_of_them = {t.name for t in spec.tensors if t.parameter and t.policy != "freeze"}
            rule = self._rule.local(Training(site, number, train.local_steps, train.lr, private=True), {})
            for step in range(train.local_steps):
                asked = rule.trains(spec, step) if rule is not None else None
                found.add(frozenset(all_of_them if asked is None else all_of_them & set(asked)))
        self._rule.round = 0
        if len(found) > 1:
            raise UserError(
                f"strategy `{self.config.strategy}` lets tensors rest in some rounds or steps, and noise that is "
                "correlated over steps is of the same ones throughout; set privacy.bands = 1"
            )

    def _resumed(self) -> dict[str, Any]:
        before, begun = self.rundir.read_run(), self.rundir.config()
        for key in type(begun).model_fields:
            if key not in ("rounds", "name") and getattr(begun, key) != getattr(self.config, key):
                raise UserError(f"{self.rundir.path}: was begun with another `{key}`; only rounds may change")
        notes: list[str] = []

        class Noting(Watch):
            def note(_, text: str) -> None:
                notes.append(text)
                self.watch.note(text)

        self.checkpoint = checkpoints.load_last(self.rundir.checkpoints, Noting())
        if self.checkpoint.round > self.config.rounds:
            raise UserError(
                f"{self.rundir.path}: has {self.checkpoint.round} rounds behind it, which rounds = "
                f"{self.config.rounds} cannot undo; give that many or more"
            )
        want = self.adapter.spec.bare
        if self.checkpoint.state.spec.bare != want:
            raise UserError(
                f"{self.rundir.checkpoints}: holds a {self.checkpoint.state.spec.method} adapter of rank "
                f"{self.checkpoint.state.spec.rank}, the configuration asks for {want.method} of rank {want.rank}"
            )
        fingerprint = before["model"]["fingerprint"]
        if fingerprint != self.base.fingerprint:
            raise UserError(
                f"{self.rundir.path}: was begun with another base model (fingerprint {fingerprint[:12]}, now "
                f"{self.base.fingerprint[:12]})"
            )
        self._rule.recall(self.checkpoint.memory)
        self.rundir.forget_metrics_after(self.checkpoint.round)
        self._tally = Tally(each_metric(self.rundir.path))
        self._past_seconds = float(before.get("seconds", 0.0))
        again = {"at": now(), "from_round": self.checkpoint.round, "note": "; ".join(notes)}
        return {"run": before["run"], "started": before["started"], "resumed": [*before["resumed"], again]}

    def start(self) -> dict[str, Any]:
        """Run all rounds that are left; returns what run.json says at the end.

        Raises :class:`UserError` with one line when the run cannot go on; what was reached stays in the run directory.
        """
        try:
            self._write("running")
            for warning in self._beforehand():
                self.watch.note(warning)
            self._join()
            self._rounds()
            self._export()
            run = self._write("finished")
            with section("report"):
                write_report(self.rundir.path)
            return run
        except UserError as error:
            self._fail(error)
            raise

    def _fail(self, error: UserError) -> None:
        try:
            self._write("failed", error=one_line(error))
            write_report(self.rundir.path)
        except UserError:
            # A full disk is the likely cause of both; the first error is the one to tell.
            return

    # Joining

    def rehearse(self) -> None:
        """Ask the sites that are there who they are, and train nothing.

        Raises :class:`UserError` for what a site refuses before it has spent anything.
        """
        self._greet(refuse=True)

    def _join(self) -> None:
        """Wait for the sites, ask each who it is, and refuse the run if one does not fit."""
        first = self.checkpoint.round + 1
        # A simulated site may come later, or be gone already.
        wanted = {s.name for s in self.config.data.sites if s.joins <= first and not 0 < s.leaves <= first}
        deadline = time.monotonic() + self.config.server.join_timeout
        while True:
            self._greet(refuse=True)
            here = set(self.strategy.sites.values())
            if here >= wanted or (time.monotonic() > deadline and len(here) >= self.config.quorum):
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"{len(here)} of {len(wanted)} sites joined within {self.config.server.join_timeout:g} s, the "
                    f"quorum is {self.config.quorum}; missing: {', '.join(sorted(wanted - here))}"
                )
            time.sleep(_POLL)
        for site in sorted(wanted - here):
            self.watch.note(f"site {site} did not join; the run goes on without it until it does")
        self.watch.run_started(first_round=first, rounds=self.config.rounds, sites=self.facts)

    def _greet(self, *, refuse: bool) -> None:
        """Ask nodes that are not known yet for their name, base model and adapter.

        ``refuse``: whether one that does not fit ends the run, or is only told of and left out.
        """
        nodes = set(self.grid.get_node_ids())
        for gone in set(self.strategy.sites) - nodes:
            del self.strategy.sites[gone]
        fresh = [node for node in sorted(nodes - set(self.strategy.sites)) if not self._rests(node)]
        if not fresh:
            return
        job = Job(
            self.run["run"], self.checkpoint.round + 1, "", self.config.to_json(), self.base.fingerprint
        ).to_record()
        messages = (
            Message(RecordDict({"job": job}), dst_node_id=node, message_type="query.hello", group_id="hello")
            for node in fresh
        )
        known = set(self.strategy.sites.values())
        # Before the run a site may take its time to load; while it runs, the others do not wait long for a new one.
        timeout = self.config.server.round_timeout if refuse else self.config.server.join_timeout
        for reply in self._ask(messages, timeout):
            if reply.has_error():
                self._note_once(f"a node failed to answer: {reply.error.reason}")
                continue
            if reply.metadata.src_node_id in self.strategy.sites:
                continue  # the same answer twice
            try:
                answer = decode_answer(reply.content, "hello", f"node {reply.metadata.src_node_id}")
                self._admit(reply.metadata.src_node_id, answer, known)
            except UserError as error:
                if refuse:
                    raise
                self._note_once(f"{error}; the run goes on without it")

    def _rests(self, node: int) -> bool:
        """Whether the key of ``node`` stands for a site that the run leaves out, which is then asked for nothing."""
        name = self.registered(node) if self.registered is not None else ""
        if not name or self.config.site(name) is not None:
            return False
        self._note_once(f"site {name} is connected, and rests: data.sites does not list it")
        return True

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.watch.note(text)

    def _admit(self, node: int, answer: Answer, known: set[str]) -> None:
        """Take in a site that fits; ``known``: the sites that are there already, to which it is added."""
        if answer.error:
            prefix = "" if answer.site in answer.error else f"site {answer.site}: "
            raise UserError(f"{prefix}{answer.error}")
        if self.registered is not None and self.registered(node) != answer.site:
            raise UserError(
                f"node {node} says it is site {answer.site}, but its key stands for "
                f"{self.registered(node) or 'no site'}; nothing of it is taken"
            )
        if self.config.site(answer.site) is None:
            raise UserError(f"node {node} says it is site `{answer.site}`, which data.sites does not list")
        if answer.site in known:
            raise UserError(f"two nodes say they are site {answer.site}; give each site its own name")
        rank = self.aggregator.ranks[answer.site]
        spec = self.adapter.spec.bare
        if answer.facts.get("spec") != self._digests.get(rank, lambda: spec.with_rank(rank).digest):
            raise UserError(
                f"site {answer.site} trains another adapter than the run's {self.config.method.name} of rank "
                f"{rank}; use one method, rank and alpha everywhere"
            )
        self.strategy.sites[node] = answer.site
        known.add(answer.site)
        self.facts[answer.site] = dict(answer.metrics)
        if answer.privacy is not None:
            # It counts rounds that were lost too, whose lines are gone.
            self._tally.promised(answer.site, asdict(answer.privacy))

    # Rounds

    def _rounds(self) -> None:
        self._evaluate_if_due(self.checkpoint.round)
        for number in range(self.checkpoint.round + 1, self.config.rounds + 1):
            self._greet(refuse=False)
            self._train(number)
            # Before the evaluation: a training that is lost has spent its privacy for nothing.
            reached = Checkpoint(number, self.strategy.state, self._rule.memory())
            checkpoints.save(
                self.rundir.checkpoints, reached, self.config.digest(), self.config.server.keep_checkpoints
            )
            self.checkpoint = reached
            self._evaluate_if_due(number)
            self._write("running")

    def _evaluate_if_due(self, number: int) -> None:
        every = self.config.evaluate.every
        due = number in (0, self.config.rounds) or (every and number % every == 0)
        if due and all(line["round"] != number for line in self._tally.of_kind("evaluate")):
            self._evaluate(number)

    def _ask(self, messages: Iterable[Message], timeout: float) -> Iterable[Message]:
        # Flower's grid goes through them twice; ours takes one at a time, so that memory does not grow with the sites.
        return self.grid.send_and_receive(list(messages) if self.engine == "flower" else messages, timeout=timeout)

    def _exchange(self, messages: Iterable[Message]) -> None:
        """Send, and collect answers; then once more to sites that did not hold the adapter they were told to use."""
        timeout = self.config.server.round_timeout
        self.strategy.collect(self._ask(messages, timeout))
        again = list(self.strategy.second_chances())
        if again:
            self.strategy.collect(self._ask(again, timeout))

    def _train(self, number: int) -> None:
        began = time.monotonic()
        if self.strategy.samples and len(self.strategy.sites) < self.config.quorum:
            raise UserError(
                f"round {number}: {len(self.strategy.sites)} of {len(self.config.site_names)} sites are connected, the "
                f"quorum is {self.config.quorum}; --resume {self.rundir.path} goes on from round {number}"
            )
        messages = self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), self.grid)
        here = set(self.strategy.sites.values()).difference(self.strategy.phase.resting)
        self.watch.phase_started("train", number, len(here))
        if here:
            for exchange in self.strategy.exchanges(messages):
                self._exchange(exchange)
        with section("aggregate"):
            enough = self.strategy.finish_train()
        line = self.strategy.record(time.monotonic() - began)
        if self.central is not None and enough:
            line["central"] = self.central.last_round()
        missing = self.strategy.phase.missing
        self._log(line | self.onlooker.of_phase(self.strategy.phase, self.strategy.state))
        if not enough:
            answered = len(self.strategy.phase.metrics.keys() - missing.keys())
            why = "; ".join(f"{site}: {reason.removeprefix(f'{site}: ')}" for site, reason in sorted(missing.items()))
            asked = len(self.config.site_names) - len(self.strategy.phase.resting)
            if self.strategy.shortfall:
                why = f": {why}" if why else ""
                raise UserError(
                    f"round {number}: {self.strategy.shortfall}{why}; --resume {self.rundir.path} goes on from round "
                    f"{number}"
                )
            raise UserError(
                f"round {number}: {answered} of {asked} sites answered, the quorum is "
                f"{min(self.config.quorum, asked)} ({why}); --resume {self.rundir.path} goes on from round {number}"
            )

    def _evaluate(self, number: int) -> None:
        began = time.monotonic()
        self.watch.phase_started("evaluate", number, len(self.strategy.sites))
        self._exchange(self.strategy.configure_evaluate(number, ArrayRecord(), ConfigRecord(), self.grid))
        self.strategy.totals()
        line = self.strategy.record(time.monotonic() - began)
        self._log(line | self.onlooker.of_phase(self.strategy.phase, self.strategy.state))

    def _log(self, line: dict[str, Any]) -> None:
        line = {**line, "time": now()}
        with section("disk"):
            self.rundir.append_metrics(line)
        self._tally.add(line)
        tell(self.watch, line)

    # The end

    def _export(self) -> None:
        """The final adapter as a PEFT folder."""
        task = create_task(self.config.task)
        with section("load"):
            base = task.load(self.config.model, self.config.task, self.config.seed)
            adapter = attach(base, self.config.method, task, self.config.seed)
        write_folder(self.rundir.adapter, lambda folder: adapter.save_peft(folder, self.strategy.state))

    def _write(self, status: str, error: str = "") -> dict[str, Any]:
        values = self._summary(status, error)
        with section("disk"):
            self.rundir.write_run(values)
        return values

    def _summary(self, status: str, error: str) -> dict[str, Any]:
        lines, evaluations = self._tally.lines, self._tally.of_kind("evaluate")
        state, spec = self.checkpoint.state, self.checkpoint.state.spec
        seconds = self._past_seconds + time.monotonic() - self.started
        up, down = (sum(line[key] for line in lines) for key in ("bytes_up", "bytes_down"))
        rounds = self.checkpoint.round
        shares = max(1, self._tally.updates)
        sites = {name: self._tally.site(name, self.facts.get(name, {})) for name in self.config.site_names}
        if self.config.secure_sum.enabled:
            for site in sites.values():
                site |= dict.fromkeys(("records", "units", "held_out"))  # which stay at the sites
        aggregator, method = self.aggregator, create_method(self.config.method.name)
        return {
            "fedgraft": __version__,
            **self.run,
            "name": self.config.name,
            "status": status,
            "error": error,
            "finished": now() if status == "finished" else "",
            "seconds": round(seconds, 2),
            "engine": self.engine,
            "versions": {name: version(name) for name in ("flwr", "torch", "transformers", "peft", "opacus")},
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest(),
            "strategy": {
                "name": self.config.strategy,
                "summary": aggregator.summary,
                "source": aggregator.source,
                "capabilities": asdict(aggregator.capabilities),
            },
            "method": {"name": method.name, "summary": method.summary, "source": method.source},
            "model": {
                "name": self.config.model,
                "fingerprint": self.base.fingerprint,
                "parameters": self.base.parameters,
                "bytes": self.base.bytes,
            },
            "adapter": {
                "parameters": spec.parameters,
                "shared": self._shared,
                "digest": state.digest,
                "folder": self.rundir.adapter.name,
            },
            "digest": state.digest,
            "rounds": rounds,
            "accuracy": _ends(evaluations, "accuracy"),
            "loss": _ends(evaluations, "loss"),
            "sites": sites,
            "missed": {fault: sum(site["missed"][fault] for site in sites.values()) for fault in FAULTS},
            "late": sum((Counter(site["late"]) for site in sites.values()), Counter()),
            "central": self._central(),
            "secure_sum": told(self.config, [line for line in lines if "secure_sum" in line]),
            "bytes_up": up,
            "bytes_down": down,
            "bytes_up_round": up // shares,
            "bytes_down_round": down // shares,
            "bytes_full_model": self.base.bytes,
            "seconds_round": round(sum(line["seconds"] for line in lines) / max(1, rounds), 3),
            "adapter_path": str(self.rundir.adapter),
            "report_path": str(self.rundir.path / "report.html"),
            "warnings": self._warnings(sites),
            **self.onlooker.of_run(lines),
        }

    def _warnings(self, sites: dict[str, Any]) -> list[str]:
        warnings = []
        if not self.config.privacy.enabled and self.central is not None:
            warnings.append("the sites add no noise (privacy.enabled = false): the server sees each update as trained")
        elif not self.config.privacy.enabled:
            warnings.append("differential privacy was switched off (privacy.enabled = false): nothing is promised")
        elif self.config.privacy.seeded_noise_not_private:
            warnings.append("the noise came from the run's seed (privacy.seeded_noise_not_private): it protects nobody")
        if self.config.central.enabled and self.config.central.seeded_noise_not_private:
            warnings.append(
                "the central noise came from the run's seed (central.seeded_noise_not_private): it protects nobody"
            )
        warnings += self._beforehand()
        warnings += self._absences(sites)
        if self.config.privacy.enabled:
            silent = self._tally.silent()
            if silent:
                warnings.append(
                    f"{', '.join(silent[:_NAMED])}{', ...' if len(silent) > _NAMED else ''}: a training was lost, and "
                    "nothing was heard since: its ledger holds more than the epsilon that is told here"
                )
        return warnings

    def _absences(self, sites: dict[str, Any]) -> list[str]:
        asked = {name: self._tally.asked(name) for name in sites}
        missed = [name for name, site in sites.items() if site["rounds"] < asked[name]]
        if len(missed) > _NAMED:
            kinds = counted({fault: sum(sites[name]["missed"][fault] for name in missed) for fault in FAULTS})
            return [f"{len(missed)} of {len(sites)} sites missed rounds ({kinds}); run.json counts them by site"]
        found = []
        for name in missed:
            said = counted(sites[name]["missed"])
            if used := sum(sites[name]["late"].values()):
                said += f"; {used} counted in a later round"
            found.append(f"{name} answered in {sites[name]['rounds']} of {asked[name]} rounds ({said})")
        return found

    def _beforehand(self) -> list[str]:
        """What is known to be doubtful before the first round."""
        found = (self.aggregator.warning(self.config.privacy.enabled), self._central_warning())
        return [text for text in found if text]

    # Central privacy

    @property
    def _shared(self) -> int:
        """How many numbers the sites share."""
        spec = self.checkpoint.state.spec
        return sum(spec.by_name[name].size for name in spec.select("share"))

    def _central_warning(self) -> str:
        return self.central.plan.warning(self._shared) if self.central is not None else ""

    def _central(self) -> dict[str, Any] | None:
        if self.central is None:
            return None
        return self.central.section(self._shared, [x["central"]["clip"] for x in self._tally.lines if "central" in x])


def _ends(evaluations: list[dict[str, Any]], key: str) -> dict[str, float | None]:
    values = [line[key] for line in evaluations]
    return {"before": values[0] if values else None, "after": values[-1] if values else None}
