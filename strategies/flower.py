"""The Flower strategy that hosts any :class:`Aggregator`: instructions out, answers in, every site named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError, one_line
from ..core.update import PrivacyStatement, Update
from ..core.wire import (
    NEEDS_STATE,
    Answer,
    Job,
    Kind,
    content_bytes,
    decode_adapter,
    decode_answer,
    encode_adapter,
)
from .aggregator import Aggregator

#: The tolerance of the plan's own promise, so that an epsilon reached exactly is not refused.
_ROUNDING = 1e-9
#: More than any site can have: a weight beyond it would drown the other sites, or overflow.
_MOST_RECORDS = 10**12


@dataclass
class Phase:
    """One training or evaluation: who answered what, who did not and why, who was not asked, and the bytes it took."""

    kind: Kind
    round: int
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    privacy: dict[str, PrivacyStatement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    resting: tuple[str, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0


class PeftStrategy(Strategy):
    """Federated PEFT with any aggregation rule on Flower's Message API.

    ``sites`` maps Flower's node ids to site names. The global adapter is :attr:`state`; the ``arrays`` that Flower's
    ``Strategy`` passes around are its packed form. Messages go out, and updates are summed, in the order of the sites'
    names. A site that already holds the global adapter, from the evaluation before, is not sent it again.
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
        self._held: dict[str, AdapterState] = {}
        self._encoded: dict[tuple[str, str], RecordDict] = {}
        self._waiting: set[str] = set()
        self._answered = 0

    # Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One instruction a site that the aggregator asks, made as it is taken, in the order of the sites' names."""
        self.aggregator.start_round(self.state)
        return self._begin("train", server_round, self.aggregator.asked(self.config.site_names))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Collect ``replies`` and close the round; (None, None) when fewer than the quorum answered."""
        self.collect(replies)
        if not self.finish_train():
            return None, None
        packed = encode_adapter(self.state, wire="fp32")
        return packed.array_records["adapter"], MetricRecord({"sites": self._answered})

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
        ordered = sorted(replies, key=self._site_of) if isinstance(replies, list) else replies
        for reply in ordered:
            self._take(reply)

    def second_chances(self) -> Iterable[Message]:
        """Full instructions for sites that turned out not to hold the adapter (a restarted site)."""
        waiting, self._waiting = self._waiting, set()
        for site in waiting:
            self._held.pop(site, None)
            self.phase.missing.pop(site, None)
        return self._instructions(sorted(waiting))

    def finish_train(self) -> bool:
        """Make the aggregate the next global adapter; False, and no change, below the quorum."""
        self._close()
        if not self.samples and self._answered < self.config.quorum:
            return False
        merged = self.aggregator.result().filled_from(self.state)
        self.state = AdapterState(self.state.spec, dict(merged)).require_finite()
        self._encoded.clear()
        return True

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

    def _site_of(self, message: Message) -> str:
        return self.sites.get(message.metadata.src_node_id, "")

    def _begin(self, kind: Kind, server_round: int, asked: Sequence[str]) -> Iterator[Message]:
        resting = tuple(site for site in self.config.site_names if site not in asked)
        self.phase = Phase(kind, server_round, resting=resting)
        self._answered = 0
        self._waiting = set()
        return self._instructions(sorted(site for site in self.sites.values() if site not in resting))

    def _instructions(self, names: list[str]) -> Iterator[Message]:
        node_of = {name: node for node, name in self.sites.items()}
        for site in names:
            content = self._content(site)
            self.phase.bytes_down += content_bytes(content)
            yield Message(
                content,
                dst_node_id=node_of[site],
                message_type=self.phase.kind,
                group_id=str(self.phase.round),
                ttl=self.config.server.round_timeout,
            )

    def _content(self, site: str) -> RecordDict:
        state = self.aggregator.for_site(self.state, site)
        held = self._held.get(site)
        key = (state.digest, held.digest if held is not None else "")
        if key not in self._encoded:
            # Memory stays flat: of the encoded forms only those of the present state are kept.
            part = state
            if held is not None:
                part = state.only(n for n in state if n not in held or held[n].tobytes() != state[n].tobytes())
            rest = key[1] if len(part) < len(state) else ""
            self._encoded[key] = encode_adapter(part, wire=self.config.server.wire_dtype, whole=state.digest, rest=rest)
        self._held[site] = state
        job = Job(self._run, self.phase.round, site, self._config_json, self._fingerprint)
        return RecordDict({"job": job.to_record(), **self._encoded[key]})

    def _take(self, reply: Message) -> None:
        site = self.sites.get(reply.metadata.src_node_id)
        if reply.has_error():
            # Flower names the node of a crashed site only sometimes; an unnamed one is found missing at the end.
            if site is not None and site not in self.phase.metrics:
                self._excuse(site, f"its process failed: {reply.error.reason}")
            return
        if site in self.phase.metrics:
            # What a site says a second time must not count twice, nor undo what it said first.
            return
        try:
            answer = decode_answer(reply.content, self.phase.kind, site or "an unknown site")
            self._accept(answer, reply, site)
        except UserError as error:
            if site is not None:
                self._excuse(site, one_line(error))

    def _accept(self, answer: Answer, reply: Message, site: str | None) -> None:
        if site is None or answer.site != site:
            raise UserError(f"{answer.site}: answered from a node that is registered as {site}")
        if answer.round != self.phase.round:
            raise UserError(f"{site}: answered for round {answer.round}, this is round {self.phase.round}")
        self.phase.bytes_up += content_bytes(reply.content)
        if answer.error:
            if answer.code == NEEDS_STATE:
                self._waiting.add(site)
            raise UserError(answer.error)
        if self.phase.kind == "train":
            shared = self.state.spec.select("share")
            state = decode_adapter(reply.content, self.state.spec, sender=site, names=shared)
            if state.spec != self.state.spec:
                raise UserError(f"{site}: says otherwise than the server which tensors are shared, frozen or its own")
            records = answer.metrics.get("records", 0)
            if not 1 <= records <= _MOST_RECORDS:
                raise UserError(f"{site}: trained on {records:g} records")
            privacy = answer.privacy or PrivacyStatement(enabled=False)
            if self.config.privacy.enabled:
                self._require_promise(site, privacy, answer.metrics)
            self.aggregator.add(Update(site, state, records, answer.metrics, privacy))
        elif not 0 <= answer.metrics.get("correct", 0) <= answer.metrics.get("examples", 0):
            raise UserError(f"{site}: counted more correct answers than examples")
        if answer.privacy is not None:
            self.phase.privacy[site] = answer.privacy
        self.phase.metrics[site] = answer.metrics
        self._answered += 1

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

    def _excuse(self, site: str, reason: str) -> None:
        # What a failed site holds is unknown: the next instruction carries the whole adapter.
        self._held.pop(site, None)
        self.phase.missing[site] = reason

    def _close(self) -> None:
        for site in self.config.site_names:
            if site not in (*self.phase.metrics, *self.phase.missing, *self.phase.resting):
                timeout = self.config.server.round_timeout
                here = site in self.sites.values()
                self._excuse(site, f"no answer in {timeout:g} s" if here else "not connected")

    def record(self, seconds: float) -> dict[str, object]:
        """The line of metrics.jsonl for the phase that has just ended."""
        phase = self.phase
        sites: dict[str, dict[str, object]] = {}
        for site in sorted(phase.metrics):
            sites[site] = dict(phase.metrics[site])
            if site in phase.privacy and phase.privacy[site].enabled:
                sites[site]["privacy"] = asdict(phase.privacy[site])
        line: dict[str, object] = {
            "kind": phase.kind,
            "round": phase.round,
            "seconds": round(seconds, 3),
            "bytes_up": phase.bytes_up,
            "bytes_down": phase.bytes_down,
            "missing": dict(sorted(phase.missing.items())),
            "sites": sites,
        }
        if phase.resting:
            line["resting"] = list(phase.resting)
        if phase.kind == "evaluate":
            totals = self.totals()
            line["examples"] = totals.get("examples", 0)
            line["accuracy"] = totals["correct"] / totals["examples"] if totals else None
            line["loss"] = totals["loss_sum"] / totals["examples"] if totals else None
        return line
