"""The gate: the last thing an answer passes on its way out, whoever made it.

It knows nothing of how an answer came about. It opens the packed message again and lets through what the wire format
declares, the policy allows and the privacy statement covers; the rest does not leave.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.update import PrivacyStatement
from ..core.wire import (
    Answer,
    Kind,
    content_bytes,
    decode_adapter,
    decode_answer,
    decode_masked,
    decode_secure,
    decode_table,
    record_of,
)
from ..privacy.securesum.terms import MOST_SITES
from .policy import Dataset, Policy, PolicyError, exceeds

_SIZES = {"records", "held_out", "units"}
_COUNTS = {"examples", "correct", "loss_sum"}
_ROUNDING = 1e-9
_ITSELF = "the answer"
#: Bytes that an answer of a secure sum says of one site, at most: a name, and a signature or shares.
_MOST_A_SITE = 1000


class GateError(UserError):
    """An answer that must not leave: it is not what was declared."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the site's gate held its answer back: {why}")


def require_refusal(content: RecordDict) -> None:
    """Raise :class:`GateError` unless ``content`` is a refusal: one line of text and nothing else."""
    record = record_of(content, "site", ConfigRecord)
    if set(content) != {"site"} or record is None or set(record) != {"name", "round", "error", "code"}:
        raise GateError("a refusal carries more than its text")


def require_allowed(
    kind: Kind,
    content: RecordDict,
    *,
    config: RunConfig,
    policy: Policy,
    dataset: Dataset,
    fingerprint: str,
    received: AdapterState | None,
) -> None:
    """Raise :class:`GateError` or :class:`PolicyError` unless the answer ``content`` may leave.

    ``fingerprint``: of the base model; ``received``: what the server sent to be trained, whose description says what
    is shared, None where nothing was.

    Guarantee
    ---------
    What passes holds no other record, metric, tensor or fact than the declared ones, every number of it finite; each
    tensor is shared by the run and allowed by the policy; where the policy requires differential privacy an adapter
    comes with a statement for at least the policy's unit, within its delta and epsilon and with secret noise.
    The gate believes the statement: that it is true is the ledger's and the engine's part.
    """
    try:
        answer = decode_answer(content, kind, _ITSELF)
        if answer.error or answer.code:
            raise UserError("it is a refusal that carries more than its text")
        if {"secure", "masked"} & set(content):
            raise UserError("it carries a part of a secure sum, which has answers of its own")
        _require_adapter(content, received, policy)
        _require_facts(answer, kind, fingerprint)
    except PolicyError:
        raise
    except UserError as error:
        raise GateError(str(error)) from None
    _require_metrics(answer, config, policy)
    _require_statement(answer.privacy, config, policy, dataset, trained=received is not None)


def require_step(kind: Kind, content: RecordDict) -> None:
    """Raise :class:`GateError` unless ``content`` is an answer of a secure sum beside the training: one message of the
    protocol, of a size that it can have, and nothing else."""
    try:
        decode_answer(content, kind, _ITSELF)
        size = len(decode_secure(content, _ITSELF))
    except UserError as error:
        raise GateError(str(error)) from None
    if set(content) != {"site", "secure"} or size > _MOST_A_SITE * (MOST_SITES + 1):
        raise GateError("it carries more than its part of the secure sum")


def require_masked(content: RecordDict, entries: int, dtype: np.dtype) -> None:
    """Raise :class:`GateError` unless ``content`` is a masked update: ``entries`` numbers of ``dtype``, and beside them
    no metric but the steps."""
    try:
        answer, found = decode_answer(content, "train", _ITSELF), decode_masked(content, _ITSELF)
    except UserError as error:
        raise GateError(str(error)) from None
    if set(content) - {"site", "metrics", "privacy", "masked"} or set(answer.metrics) != {"steps"}:
        raise GateError("it carries more than a masked update")
    if found.shape != (entries,) or found.dtype != dtype:
        raise GateError(f"it carries {found.size} numbers of {found.dtype}, not {entries} of {dtype}")


def left(content: RecordDict) -> dict[str, Any]:
    """What an answer carries, for the audit log: names, shapes, numbers that are not tensors, bytes, and a digest."""
    told: dict[str, Any] = {"bytes": content_bytes(content), "sha256_of_content": _digest(content)}
    for name in ("metrics", "facts", "privacy"):
        if name in content:
            told[name] = {key: _plain(value) for key, value in content[name].items()}
    if "table" in content:
        table = decode_table(content, _ITSELF)
        told["wire"] = table.wire
        told["tensors"] = {name: list(shape) for name, shape in table.tensors}
    if "masked" in content:
        entries = decode_masked(content, _ITSELF)
        told["masked"] = {"entries": entries.size, "dtype": entries.dtype.name}
    return told


def _require_adapter(content: RecordDict, received: AdapterState | None, policy: Policy) -> None:
    if received is None:
        if {"adapter", "table"} & set(content):
            raise UserError("it carries an adapter, though nothing was trained")
        return
    shared = received.spec.select("share")
    # The strict way in of the other end: it refuses every tensor but these, and numbers that are none.
    state = decode_adapter(content, received.spec, sender=_ITSELF, names=shared, base=received)
    if state.spec != received.spec:
        raise UserError("it says otherwise than the run which tensors are shared")
    policy.require_tensors(shared)


def _require_facts(answer: Answer, kind: Kind, fingerprint: str) -> None:
    facts: Mapping[str, str] = answer.facts
    if kind != "hello":
        if facts:
            raise UserError("it carries facts, which only a greeting does")
    elif facts.get("fingerprint") != fingerprint or not re.fullmatch("[0-9a-f]{1,64}", facts.get("spec", "")):
        raise UserError("its facts are not the digests of the base model and of the adapter")


def _require_metrics(answer: Answer, config: RunConfig, policy: Policy) -> None:
    names = set(answer.metrics)
    if names & _SIZES and policy.metrics.sizes == "none":
        raise PolicyError("the answer tells how many records there are", policy.rule("metrics", "sizes"))
    if "loss" in names:
        if config.privacy.enabled:
            raise GateError("it tells a training loss, which no noise protects")
        if policy.metrics.training_loss == "none":
            raise PolicyError("the answer tells the training loss", policy.rule("metrics", "training_loss"))
    if names & _COUNTS:
        asked = config.evaluation_release
        told = answer.privacy.metrics if answer.privacy is not None else "exact_not_private"
        if told != asked:
            raise GateError(f"its counts are {told}, the run asks for {asked}")
        if exceeds(told, policy.metrics.evaluation):
            raise PolicyError(f"the answer's counts are {told}", policy.rule("metrics", "evaluation"))


def _require_statement(
    told: PrivacyStatement | None, config: RunConfig, policy: Policy, dataset: Dataset, *, trained: bool
) -> None:
    if told is None or not told.enabled:
        if trained and policy.require.dp:
            raise PolicyError("the update carries no privacy statement", policy.rule("require", "dp"))
        if trained and config.privacy.enabled:
            raise GateError("the update carries no privacy statement")
        return
    at = policy.datasets.index(dataset)
    if dataset.min_unit == "patient" and told.unit != "patient":
        raise PolicyError(f"each {told.unit} alone is protected", policy.rule("dataset", at, "min_unit"))
    if told.delta > dataset.max_delta:
        raise PolicyError(f"the statement's delta is {told.delta:g}", policy.rule("dataset", at, "max_delta"))
    if told.epsilon > dataset.max_epsilon * (1 + _ROUNDING):
        raise PolicyError(f"the statement's epsilon is {told.epsilon:.4g}", policy.rule("dataset", at, "max_epsilon"))
    if policy.require.secret_noise and not told.private_noise:
        raise PolicyError(
            "noise on these data once came from a seed, in this run or an earlier one",
            policy.rule("require", "secret_noise"),
        )


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _digest(content: RecordDict) -> str:
    """SHA-256 over all that is sent, in an order of its own."""
    whole = hashlib.sha256()
    for key in sorted(content):
        record = content[key]
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                whole.update(f"{key}/{name}/{array.dtype}/{list(array.shape)}/{len(array.data)}\n".encode())
                whole.update(array.data)
        else:
            whole.update(f"{key}/{json.dumps(dict(record), sort_keys=True, default=repr)}\n".encode())
    return whole.hexdigest()
