"""The Flower strategy that hosts any :class:`Aggregator`: instructions out, answers in, every site named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError, one_line
from ..core.profile import section
from ..core.update import PrivacyStatement, Update
from ..core.wire import (
    NEEDS_STATE,
    Answer,
    Fault,
    Job,
    Kind,
    content_bytes,
    decode_adapter,
    decode_answer,
    encode_adapter,
    fault_of,
    record_of,
)
from .aggregator import Aggregator
from .lateness import Awaited, Late, rebased, staleness_weight

#: The tolerance of the plan's own promise, so that an epsilon reached exactly is not refused.
_ROUNDING = 1e-9
#: More than any site can have: a weight beyond it would drown the other sites, or overflow.
_MOST_RECORDS = 10**12
#: Encoded instructions that are kept: the sites of a rank or role share one.
_KEEP = 8


@dataclass
class Exchange:
    """One instruction to each of some sites, and their answers: the bytes of each by site."""

    kind: Kind
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)


@dataclass
class Phase:
    """One training or evaluation: who answered what, who did not and why, who was not asked, and the bytes it took.

    ``faults``: what became of those who are ``missing``; ``refined``: who gave the second answer of a training in two
    passes; ``late``: what came of earlier trainings in this one.
    """

    kind: Kind
    round: int
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    privacy: dict[str, PrivacyStatement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    resting: tuple[str, ...] = ()
    refined: set[str] = field(default_factory=set)
    exchanges: list[Exchange] = field(default_factory=list)
    late: list[Late] = field(default_factory=list)

    @property
    def bytes_up(self) -> int:
        fresh = sum(sum(exchange.up.values()) for exchange in self.exchanges)
        return fresh + sum(late.size for late in self.late)

    @property
    def bytes_down(self) -> int:
        return sum(sum(exchange.down.values()) for exchange in self.exchanges)


class PeftStrategy(Strategy):
    """Federated PEFT with any aggregation rule on Flower's Message API.

    ``sites`` maps Flower's node ids to site names. The global adapter is :attr:`state`; the ``arrays`` that Flower's
    ``Strategy`` passes around are its packed form. Messages go out, and updates are summed, in the order of the sites'
    names. A site that already holds the global adapter, from the evaluation before, is not sent it again.

    Under ``server.late = "staleness"`` a result theta_k of round r that comes in round t > r counts once in that: as
    theta_t + (theta_k - theta_r), with its weight times (1 + t - r)^-a. It makes no quorum; a site whose fresh result
    comes in the same round counts with both, since each was trained, and paid for, by itself.
    """

    def __init__(
        self, aggregator: Aggregator, state: AdapterState, config: RunConfig, *, run: str, fingerprint: str
    ) -> None:
        self.aggregator = aggregator
        self.state = state
        self.config = config
        self.sites: dict[int, str] = {}
        self.phase = Phase("train", 0)
        self._run = run
        self._fingerprint = fingerprint
        self._config_json = config.to_json()
        # What each site holds, and what its answer is about. Equal states are one object, whatever the number of sites.
        self._held: dict[str, AdapterState] = {}
        self._sent: dict[str, AdapterState] = {}
        self._encoded: OrderedDict[tuple[str, str, str], tuple[AdapterState, RecordDict]] = OrderedDict()
        self._second: AdapterState | None = None
        self._waiting: set[str] = set()
        self._answered = 0
        self._awaited = Awaited(config.server.most_late)

    # Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One instruction a site that the aggregator asks, made as it is taken, in the order of the sites' names."""
        self.aggregator.round = server_round
        self.aggregator.start_round(self.state)
        return self._begin("train", server_round, self._drawn(self.aggregator.asked(self.config.site_names)))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Collect ``replies`` and close the round; (None, None) when fewer than the quorum answered."""
        self.collect(replies)
        if not self.finish_train():
            return None, None
        packed = encode_adapter(self.state, wire="fp32")
        return record_of(packed, "adapter", ArrayRecord), MetricRecord({"sites": self._answered})

    def configure_refine(self) -> Iterable[Message]:
        """The second instructions of a round, to the sites that answered the first; none for most strategies."""
        if self._below_quorum():
            return ()
        self._second = self.aggregator.second_pass()
        if self._second is None:
            return ()
        self._waiting = set()
        return self._instructions(sorted(self.phase.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._begin("evaluate", server_round, self.config.site_names)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        self.collect(replies)
        totals = self.totals()
        return MetricRecord(dict(totals.items())) if totals else None

    def summary(self) -> None:
        """Nothing to log: the run directory says it."""

    # What the round loop uses beside it

    def collect(self, replies: Iterable[Message]) -> None:
        """Take in answers one by one; a lazily produced ``replies`` never holds two updates at a time."""
        ordered = sorted(replies, key=self._order) if isinstance(replies, list) else replies
        for reply in ordered:
            self._take(reply)

    def exchanges(self, first: Iterable[Message]) -> Iterator[Iterable[Message]]:
        """What a training exchanges with the sites, one after the other; ``first``: from :meth:`configure_train`.

        Each is to be over, its answers collected, before the next is asked for.
        """
        yield first
        yield self.configure_refine()

    @property
    def shortfall(self) -> str:
        """Why a training came to nothing, where the answers that are missing do not say it."""
        return ""

    def second_chances(self) -> Iterable[Message]:
        """Full instructions for sites that turned out not to hold the adapter (a restarted site)."""
        waiting, self._waiting = self._waiting, set()
        for site in waiting:
            self._held.pop(site, None)
            self.phase.missing.pop(site, None)
            self.phase.faults.pop(site, None)
        return self._instructions(sorted(waiting))

    def finish_train(self) -> bool:
        """Make the aggregate the next global adapter; False, and no change, below the quorum."""
        self._close()
        if self._below_quorum():
            return False
        result = self.aggregator.result()
        if set(result) != set(result.spec.names) or result.spec == self.state.spec:
            known = {name: array for name, array in result.items() if name in self.state.spec.by_name}
            result = AdapterState(self.state.spec, {**self.state, **known})
        if result.spec.bare != self.state.spec.bare:
            raise UserError(f"strategy `{self.config.strategy}` made another adapter of the one it was given")
        self.state = result.require_finite()
        for node, site in self.sites.items():
            if self.phase.faults.get(site) == "late" and site in self._sent:
                self._awaited.add(self.phase.round, node, site, self._sent[site])
        self._encoded.clear()
        self._sent.clear()
        self._second = None
        return True

    def _below_quorum(self) -> bool:
        answered = self._answered if self._second is None else len(self.phase.refined)
        # No more can be waited for than the strategy asked.
        asked = len(self.config.site_names) - len(self.phase.resting)
        return not self.samples and answered < min(self.config.quorum, asked)

    def totals(self) -> dict[str, float]:
        """Sums over the sites' evaluation counts; empty when no site released any."""
        self._close()
        counted = [metrics for metrics in self.phase.metrics.values() if metrics.get("examples")]
        keys = ("examples", "correct", "loss_sum")
        return {key: sum(metrics[key] for metrics in counted) for key in keys} if counted else {}

    @property
    def samples(self) -> bool:
        """Whether the sites of a round are drawn by chance, for privacy.

        Then a round stands whoever answers: one that were dropped for its answers would tell who had been drawn. The
        quorum is of the sites that are connected when the round begins, of which the draw knows nothing.
        """
        return self.config.central.enabled and self.config.central.sampling_rate < 1

    # Inside

    def _order(self, message: Message) -> tuple[str, int, str]:
        """By the site's name, and of a site the earlier round first."""
        about = message.metadata
        return self.sites.get(about.src_node_id, ""), len(about.group_id), about.group_id

    def _drawn(self, sites: Sequence[str]) -> Sequence[str]:
        """``server.sites_per_round`` of ``sites``, by the seed and the round alone; all of them where it is 0."""
        most = self.config.server.sites_per_round
        if not most or most >= len(sites):
            return sites
        rng = np.random.default_rng([self.config.seed, 12, self.aggregator.round])
        return [sites[index] for index in sorted(rng.permutation(len(sites))[:most])]

    def _begin(self, kind: Kind, server_round: int, asked: Sequence[str]) -> Iterator[Message]:
        training = set(asked)
        resting = tuple(site for site in self.config.site_names if site not in training)
        self.phase = Phase(kind, server_round, resting=resting)
        if kind == "train":
            self.phase.late = self._awaited.outdated(server_round)
        self._answered = 0
        self._waiting = set()
        self._sent.clear()
        self._second = None
        return self._instructions(sorted(site for site in self.sites.values() if site in training))

    def _instructions(self, names: list[str]) -> Iterator[Message]:
        node_of = {name: node for node, name in self.sites.items()}
        exchange = Exchange("refine" if self._second is not None else self.phase.kind)
        self.phase.exchanges.append(exchange)
        for site in names:
            content = self._content(site)
            exchange.down[site] = content_bytes(content)
            yield Message(
                content,
                dst_node_id=node_of[site],
                message_type="query.refine" if exchange.kind == "refine" else exchange.kind,
                group_id=str(self.phase.round),
                ttl=self._patience,
            )

    @property
    def _patience(self) -> float:
        """Seconds after which Flower forgets an instruction, and takes no answer to it."""
        server = self.config.server
        # Each of the later rounds in which a result may count trains and evaluates.
        return server.round_timeout * (1 + 2 * server.most_late * (self.phase.kind == "train"))

    def _content(self, site: str) -> RecordDict:
        state = self.aggregator.for_site(self.state if self._second is None else self._second, site)
        held = self._held.get(site)
        key = (state.spec.digest, state.digest, held.digest if held is not None else "")
        if key not in self._encoded:
            part = state
            if held is not None:
                part = state.only(n for n in state if n not in held or held[n].tobytes() != state[n].tobytes())
            rest = key[2] if len(part) < len(state) else ""
            server = self.config.server
            packed = encode_adapter(
                part, wire=server.wire_dtype, whole=state.digest, rest=rest, code=server.entropy_coding
            )
            self._encoded[key] = (state, packed)
            while len(self._encoded) > _KEEP:
                self._encoded.popitem(last=False)
        state, packed = self._encoded[key]
        self._held[site] = self._sent[site] = state
        job = Job(self._run, self.phase.round, site, self._config_json, self._fingerprint)
        return RecordDict({"job": job.to_record(), **packed})

    def _take(self, reply: Message) -> None:
        site = self.sites.get(reply.metadata.src_node_id)
        if reply.has_error():
            # Flower names the node of a crashed site only sometimes; an unnamed one is found missing at the end.
            if site is not None and (self._second is not None or site not in self.phase.metrics):
                fault = fault_of(reply.error)
                why = reply.error.reason or "no reason given"
                self._excuse(site, f"its process failed: {why}" if fault == "crashed" else why, fault)
            return
        if self.config.server.most_late and self.phase.kind == "train" and self._take_late(reply):
            return
        if site in (self.phase.metrics if self._second is None else self.phase.refined):
            # What a site says a second time must not count twice, nor undo what it said first.
            return
        try:
            kind = "refine" if self._second is not None else self.phase.kind
            answer = decode_answer(reply.content, kind, site or "an unknown site")
            self._accept(answer, reply, site)
        except UserError as error:
            if site is not None:
                self._excuse(site, one_line(error), "refused")

    def _accept(self, answer: Answer, reply: Message, site: str | None) -> None:
        if site is None or answer.site != site:
            raise UserError(f"{answer.site}: answered from a node that is registered as {site}")
        if answer.round != self.phase.round:
            raise UserError(f"{site}: answered for round {answer.round}, this is round {self.phase.round}")
        self.phase.exchanges[-1].up[site] = content_bytes(reply.content)
        if answer.error:
            if answer.code == NEEDS_STATE:
                self._waiting.add(site)
            raise UserError(answer.error)
        if self._second is not None:
            self._accept_refined(answer, reply, site)
            return
        if self.phase.kind == "train":
            self._accept_update(answer, reply, site)
        elif not 0 <= answer.metrics.get("correct", 0) <= answer.metrics.get("examples", 0):
            raise UserError(f"{site}: counted more correct answers than examples")
        if answer.privacy is not None:
            self.phase.privacy[site] = answer.privacy
        self.phase.metrics[site] = answer.metrics
        self._answered += 1
        # An answer to an earlier question may have come first.
        self.phase.missing.pop(site, None)
        self.phase.faults.pop(site, None)

    def _accept_update(self, answer: Answer, reply: Message, site: str) -> None:
        self._add(self._update(answer, reply, site, self._sent[site]))

    def _add(self, update: Update) -> None:
        with section("aggregate"):
            self.aggregator.add(update)

    def _update(self, answer: Answer, reply: Message, site: str, sent: AdapterState) -> Update:
        """What ``site`` made of ``sent``. Raises :class:`UserError` for what it must not be."""
        state = self._decode(reply, site, sent)
        if state.spec != sent.spec:
            raise UserError(f"{site}: says otherwise than the server which tensors are shared, frozen or its own")
        records = answer.metrics.get("records", 0)
        if not 1 <= records <= _MOST_RECORDS:
            raise UserError(f"{site}: trained on {records:g} records")
        privacy = answer.privacy or PrivacyStatement(enabled=False)
        if self.config.privacy.enabled:
            self._require_promise(site, privacy, answer.metrics)
        return Update(site, state, records, answer.metrics, privacy)

    def _take_late(self, reply: Message) -> bool:
        """Take in ``reply`` where it is to an instruction of an earlier round; False: it is not."""
        try:
            answer = decode_answer(reply.content, "train", "a site")
        except UserError:
            return False
        if answer.round >= self.phase.round:
            return False
        awaited = self._awaited.take(answer.round, reply.metadata.src_node_id)
        # One that is not awaited has counted before, or was told of as too old.
        if awaited is not None:
            site, given = awaited
            late = Late(site, answer.round, self.phase.round - answer.round, size=content_bytes(reply.content))
            try:
                self._accept_late(answer, reply, late, given)
                late = replace(late, privacy=answer.privacy)
            except UserError as error:
                late = replace(late, why=one_line(error))
            self.phase.late.append(late)
        return True

    def _accept_late(self, answer: Answer, reply: Message, late: Late, given: AdapterState) -> None:
        if answer.site != late.site:
            raise UserError(f"{answer.site}: answered from a node that is registered as {late.site}")
        if answer.error:
            raise UserError(answer.error)
        update = self._update(answer, reply, late.site, given)
        now = self.aggregator.for_site(self.state, late.site)
        if now.spec != given.spec:
            raise UserError(f"{late.site}: other tensors are shared, frozen or its own in this round")
        weight = update.weight * staleness_weight(late.age, self.config.server.staleness_exponent)
        self._add(replace(update, state=rebased(update.state, given, now), weight=weight))

    def _decode(self, reply: Message, site: str, sent: AdapterState) -> AdapterState:
        with section("wire"):
            return decode_adapter(reply.content, sent.spec, sender=site, names=sent.spec.select("share"), base=sent)

    def _accept_refined(self, answer: Answer, reply: Message, site: str) -> None:
        if site not in self.phase.metrics:
            raise UserError(f"{site}: was not asked a second time")
        privacy = answer.privacy or PrivacyStatement(enabled=False)
        if self.config.privacy.enabled:
            self._require_promise(site, privacy, answer.metrics)
        first = self.phase.metrics[site]
        state = self._decode(reply, site, self._sent[site])
        self.aggregator.add_refined(Update(site, state, first["records"], first, privacy))
        self.phase.refined.add(site)

    def _require_promise(self, site: str, promise: PrivacyStatement, metrics: Mapping[str, float]) -> None:
        """Raise :class:`UserError` unless the site says that it kept to the run's privacy."""
        asked = self.config.privacy
        if not promise.enabled:
            raise UserError(f"{site}: sent an update without the differential privacy that the run demands")
        if "loss" in metrics:
            raise UserError(f"{site}: sent its training loss, which no noise protects")
        if promise.unit != asked.unit:
            raise UserError(f"{site}: protects each {promise.unit}, the run demands each {asked.unit}")
        if promise.delta > asked.delta or promise.epsilon > asked.epsilon * (1 + _ROUNDING):
            raise UserError(
                f"{site}: spent epsilon {promise.epsilon:.4g} at delta {promise.delta:g}, the run allows "
                f"{asked.epsilon:g} at {asked.delta:g}"
            )
        if not promise.private_noise and not asked.seeded_noise_not_private:
            raise UserError(f"{site}: drew its noise from a seed, which the run does not allow")

    def _excuse(self, site: str, reason: str, fault: Fault) -> None:
        # What a failed site holds is unknown: the next instruction carries the whole adapter.
        self._held.pop(site, None)
        self.phase.missing[site] = reason
        self.phase.faults[site] = fault

    def _close(self) -> None:
        told = {*self.phase.metrics, *self.phase.missing, *self.phase.resting}
        silent = [site for site in self.config.site_names if site not in told]
        here = set(self.sites.values()) if silent else set()
        for site in silent:
            if site in here:
                self._excuse(site, f"no answer in {self.config.server.round_timeout:g} s", "late")
            else:
                self._excuse(site, "not connected", "absent")

    def record(self, seconds: float) -> dict[str, object]:
        """The line of metrics.jsonl for the phase that has just ended."""
        phase = self.phase
        sites: dict[str, dict[str, object]] = {}
        for site in sorted(phase.metrics):
            sites[site] = dict(phase.metrics[site])
            if site in phase.privacy and phase.privacy[site].enabled:
                sites[site]["privacy"] = dict(vars(phase.privacy[site]))
        line: dict[str, object] = {
            "kind": phase.kind,
            "round": phase.round,
            "seconds": round(seconds, 3),
            "bytes_up": phase.bytes_up,
            "bytes_down": phase.bytes_down,
            "missing": dict(sorted(phase.missing.items())),
            "faults": dict(sorted(phase.faults.items())),
            "sites": sites,
        }
        if phase.resting:
            line["resting"] = list(phase.resting)
        if phase.late:
            line["late"] = [late.record() for late in phase.late]
        if phase.kind == "evaluate":
            totals = self.totals()
            line["examples"] = totals.get("examples", 0)
            line["accuracy"] = totals["correct"] / totals["examples"] if totals else None
            line["loss"] = totals["loss_sum"] / totals["examples"] if totals else None
        return line
