"""The Flower strategy under a secure sum: the exchanges of the protocol around the training, and one update for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError, one_line
from ..core.profile import section
from ..core.update import PrivacyStatement, Update
from ..core.vector import moved
from ..core.wire import (
    STEPS,
    Answer,
    Fault,
    Job,
    Kind,
    content_bytes,
    decode_answer,
    decode_masked,
    decode_secure,
    encode_secure,
    fault_of,
)
from ..privacy.securesum import SecureServer, Sum, Terms
from ..privacy.securesum.messages import Advert, Agreement, Envelopes, Reveal
from ..privacy.securesum.server import ShortError
from .central import TOGETHER
from .flower import Exchange, PeftStrategy


class SecureSumStrategy(PeftStrategy):
    """:class:`PeftStrategy` that is told of no update, weight or loss of a site: the aggregator gets one update, the
    mean of all, with the sum of the weights.

    A training is five exchanges: keys, sealed shares, the training itself (answered with masked numbers), the
    survivors, and the shares that unmask the sum. A site that is lost before its numbers came is missing in the round;
    one that is lost after them counts, and is told of as ``unheard``.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        super().configure_train(server_round, arrays, config, grid)
        here = sorted(set(self.sites.values()).difference(self.phase.resting))
        sent = self.aggregator.for_site(self.state, self.config.site_names[0])
        length = sum(sent.spec.by_name[name].size for name in sent.spec.select("share"))
        self._server = SecureServer(Terms.of(self.config, self._run, server_round), length)
        self._base: AdapterState | None = None
        self._sum: Sum | None = None
        self._short = ""
        self._envelopes: Mapping[str, Envelopes] = {}
        self._unheard: dict[str, str] = {}
        return self._ask("keys", dict.fromkeys(here))

    def exchanges(self, first: Iterable[Message]) -> Iterator[Iterable[Message]]:
        server = self._server
        try:
            yield first
            adverts = server.adverts
            yield self._ask("shares", {advert.site: adverts.encode() for advert in adverts.adverts})
            self._envelopes = server.envelopes
            yield self._instructions(sorted(self._envelopes))
            survivors = server.survivors
            if super()._below_quorum():
                return
            yield self._ask("agree", dict.fromkeys(survivors.sites, survivors.encode()))
            agreements = server.agreements
            yield self._ask("reveal", dict.fromkeys(sorted(agreements.signatures), agreements.encode()))
            with section("wire"):
                self._sum = server.result()
        except UserError as error:
            why = "; ".join(f"{site}: {reason.removeprefix(f'{site}: ')}" for site, reason in self._unheard.items())
            self._short = f"{error}{f' ({why})' if why else ''}"
            if not isinstance(error, ShortError):
                raise UserError(f"round {self.phase.round}: {self._short}") from None

    @property
    def shortfall(self) -> str:
        return self._short

    def finish_train(self) -> bool:
        if self._sum is not None and self._base is not None:
            names = self._base.spec.select("share")
            mean = moved(self._base, names, self._sum.mean).require_finite()
            self.aggregator.add(Update(TOGETHER, mean, float(self._sum.weight)))
        return super().finish_train()

    def record(self, seconds: float) -> dict[str, object]:
        line = super().record(seconds)
        if self.phase.kind == "train" and self._sum is not None:
            line["secure_sum"] = {
                "sites": len(self._sum.sites),
                "weight": self._sum.weight,
                "error": self._sum.error,
                "unheard": dict(sorted(self._unheard.items())),
            }
        return line

    # Inside

    def _below_quorum(self) -> bool:
        return self._sum is None or super()._below_quorum()

    def _ask(self, kind: Kind, messages: Mapping[str, bytes | None]) -> Iterator[Message]:
        """An instruction of the protocol to each of some sites."""
        node_of = {name: node for node, name in self.sites.items()}
        exchange = Exchange(kind)
        self.phase.exchanges.append(exchange)
        for site, message in messages.items():
            job = Job(self._run, self.phase.round, site, self._config_json, self._fingerprint)
            content = RecordDict({"job": job.to_record(), **(encode_secure(message) if message is not None else {})})
            exchange.down[site] = content_bytes(content)
            yield Message(
                content,
                dst_node_id=node_of[site],
                message_type=f"query.{kind}",
                group_id=str(self.phase.round),
                ttl=self.config.server.round_timeout,
            )

    def _content(self, site: str) -> RecordDict:
        content = super()._content(site)
        if self.phase.kind == "train":
            sent = self._sent[site]
            if self._base is None:
                self._base = sent
            elif (sent.spec, sent.digest) != (self._base.spec, self._base.digest):
                raise UserError(
                    f"strategy `{self.config.strategy}` sends sites different adapters, whose changes a secure sum "
                    "cannot average; choose another, or set secure_sum.enabled = false"
                )
            content["secure"] = encode_secure(self._envelopes[site].encode())["secure"]
        return content

    def _take(self, reply: Message) -> None:
        step = self.phase.exchanges[-1].kind if self.phase.exchanges else self.phase.kind
        if step not in STEPS:
            super()._take(reply)
            return
        site = self.sites.get(reply.metadata.src_node_id)
        if site is None or site in self.phase.exchanges[-1].up:
            return
        if reply.has_error():
            self._lose(step, site, reply.error.reason or "its process failed", fault_of(reply.error))
            return
        self.phase.exchanges[-1].up[site] = content_bytes(reply.content)
        try:
            answer = decode_answer(reply.content, step, site)
            if (answer.site, answer.round) != (site, self.phase.round):
                raise UserError(f"{site}: answered as {answer.site} for round {answer.round}")
            if answer.error:
                raise UserError(answer.error)
            self._accept_step(step, site, decode_secure(reply.content, site))
        except UserError as error:
            self._lose(step, site, one_line(error), "refused")

    def _accept_step(self, step: Kind, site: str, message: bytes) -> None:
        if step == "keys":
            self._server.advert(site, Advert.decode(message, site))
        elif step == "shares":
            self._server.shared(site, Envelopes.decode(message, site))
        elif step == "agree":
            self._server.agreed(site, Agreement.decode(message, site))
        else:
            self._server.revealed(site, Reveal.decode(message, site))

    def _lose(self, step: Kind, site: str, reason: str, fault: Fault) -> None:
        if step in ("keys", "shares"):
            self._excuse(site, reason, fault)
        else:
            self._unheard[site] = reason

    def _accept_update(self, answer: Answer, reply: Message, site: str) -> None:
        told = sorted(set(answer.metrics) & {"records", "loss"})
        if told:
            raise UserError(f"{site}: told its {told[0]}, which a secure sum keeps at the site")
        if "adapter" in reply.content:
            raise UserError(f"{site}: sent its update in the open")
        if self.config.privacy.enabled:
            self._require_promise(site, answer.privacy or PrivacyStatement(enabled=False), answer.metrics)
        entries = decode_masked(reply.content, site)
        with section("wire"):
            self._server.masked(site, entries)


def told(config: RunConfig, rounds: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ``secure_sum`` section of run.json, over the lines of the ``rounds`` that had one; None where it is off."""
    if not config.secure_sum.enabled:
        return None
    terms, errors = Terms.of(config, "", 0), [line["secure_sum"]["error"] for line in rounds]
    return {
        "sites": len(terms.sites),
        "threshold": terms.threshold,
        "colluders": terms.colluders,
        "bits": terms.bits,
        "range": terms.limit,
        "most_records": terms.most_weight,
        "step": terms.ring.step,
        "error": float(np.max(errors)) if errors else None,
    }
