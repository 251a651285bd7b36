"""What a hostile coordinator may send: each is refused in one line, spends nothing, and is in the audit log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedgraft.core import packing
from fedgraft.core.adapter import AdapterState, TensorSpec
from fedgraft.core.wire import decode_answer, encode_adapter
from fedgraft.privacy import Ledger

#: What makes a site strict, as (of the open policy, instead).
STRICT = (
    ('base_models = ["*"]', 'base_models = ["{fingerprint}"]'),
    ("max_epsilon = inf", "max_epsilon = 3.0"),
    ('evaluation = "exact"', 'evaluation = "none"'),
    ('training_loss = "exact"', 'training_loss = "none"'),
)
_EXTRA = TensorSpec("notes", (4,), "float32", "notes", parameter=False)


def with_table(content: RecordDict, **changes: Any) -> RecordDict:
    table = {**json.loads(content["table"]["json"]), **changes}
    return RecordDict({"adapter": content["adapter"], "table": ConfigRecord({"json": json.dumps(table)})})


def plain(state: AdapterState) -> RecordDict:
    return encode_adapter(state, wire="fp32")


def unasked_tensor(state: AdapterState) -> RecordDict:
    """One that no adapter of this method has."""
    content = plain(state)
    tensors = json.loads(content["table"]["json"])["tensors"]
    return with_table(content, tensors=[*tensors, ["notes", [4]]])


def twice(state: AdapterState) -> RecordDict:
    content = plain(state)
    tensors = json.loads(content["table"]["json"])["tensors"]
    return with_table(content, tensors=[*tensors, tensors[0]])


def not_a_number(state: AdapterState) -> RecordDict:
    content = plain(state)
    numbers = content["adapter"]["float32"].numpy().copy()
    numbers[3] = np.nan
    return RecordDict({**content, "adapter": ArrayRecord({"float32": Array(numbers)})})


def oversized(state: AdapterState) -> RecordDict:
    numbers = np.zeros(_limit(state), np.float32)
    return RecordDict({**plain(state), "adapter": ArrayRecord({"float32": Array(numbers)})})


def bomb(state: AdapterState) -> RecordDict:
    """A few kilobytes, honestly described, that inflate to many times the limit."""
    vast = state.spec.with_extras([replace(_EXTRA, shape=(20 * _limit(state),))])
    zeros = np.zeros(20 * _limit(state), np.float32)
    return encode_adapter(AdapterState(vast, {**state, "notes": zeros}), wire="fp32", code=True)


def vast_head(state: AdapterState) -> RecordDict:
    """An array that declares terabytes."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    array = Array("float32", (1 << 40,), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00" + head)
    return RecordDict({**plain(state), "adapter": ArrayRecord({"float32": array})})


def pickled(state: AdapterState) -> RecordDict:
    array = Array("float32", (6,), "numpy.ndarray", b"\x80\x04cposix\nsystem\n.")
    return RecordDict({**plain(state), "adapter": ArrayRecord({"float32": array})})


def nested(state: AdapterState) -> RecordDict:
    return RecordDict({**plain(state), "table": ConfigRecord({"json": "[" * 50_000})})


def undeclared(state: AdapterState) -> RecordDict:
    return RecordDict({**plain(state), "code": ConfigRecord({"python": "import os"})})


def _limit(state: AdapterState) -> int:
    """Room for the job and four times its adapter."""
    return (1 << 18) + 16 * sum(array.size for array in state.values())


#: The message, and what the refusal says of it.
MESSAGES: Mapping[str, tuple[Callable[[AdapterState], RecordDict], str]] = {
    "a tensor too many": (unasked_tensor, "unknown tensor notes"),
    "a tensor twice": (twice, "is listed twice"),
    "not a number": (not_a_number, "NaN or infinity"),
    "oversized": (oversized, "the message is too large"),
    "decompression bomb": (bomb, "would inflate to"),
    "a head that declares terabytes": (vast_head, "declares 4398046511104 bytes of numbers and holds 0"),
    "a pickle": (pickled, "cannot be read"),
    "deep nesting": (nested, "table of contents is not JSON"),
    "an undeclared record": (undeclared, "undeclared record `code`"),
}
#: Changes of the job or of the run's configuration, and the line of the policy that forbids it.
JOBS: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "changed base model": ({"fingerprint": "0" * 64}, {}, "base_models"),
    "epsilon beyond the policy": ({}, {"privacy.epsilon": 3.5}, "max_epsilon"),
    "a metric that the policy hides": ({}, {"evaluate.release": "exact_not_private"}, "evaluation"),
    "a training loss that the policy hides": (
        {},
        {"privacy.enabled": False, "evaluate.release": "none"},
        "training_loss",
    ),
}


@pytest.fixture
def talk(tiny_federation: Any, tmp_path: Path, conversation: ModuleType) -> Callable[..., Any]:
    """``talk(**changes)``: a conversation with a strict site, about a job that it lets pass but for ``changes``."""

    def begin(**changes: Any) -> Any:
        settings = {"privacy.noise_multiplier": 3.0, "evaluate.release": "none", **changes}
        talk = conversation.Conversation(tiny_federation.private(**settings), tmp_path / "north")
        text = conversation.open_policy(tiny_federation.table)
        for old, new in STRICT:
            assert old in text
            text = text.replace(old, new.replace("{fingerprint}", talk.model.base.fingerprint))
        (tmp_path / "north" / "policy.toml").write_text(text)
        return talk

    return begin


def require_refused(talk: Any, content: RecordDict) -> tuple[str, dict[str, Any]]:
    """What the refusal says, and its line in the audit log: nothing is spent, and nothing else left."""
    answer = decode_answer(content, "train", "north")
    assert answer.error and set(content) == {"site"} and answer.site == "north"
    assert Ledger(talk.folder / "ledgers").events() == ()
    events = [line["event"] for line in talk.log()]
    assert events[-1] == "refused" and "left" not in events
    line = talk.log()[-1]
    assert (line["site"], line["kind"]) == ("north", "train")
    return answer.error, line


def test_the_strict_site_trains_what_is_honest(talk: Callable[..., Any]) -> None:
    answer, _ = talk().train()
    assert answer.error == ""


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_no_honest_coordinator_sends_is_refused(
    name: str, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, why = MESSAGES[name]
    talking = talk()
    content = make(talking.state)
    monkeypatch.setattr(packing, "LIMIT", _limit(talking.state))
    monkeypatch.setattr(packing, "_TEXTS", 2)
    said, line = require_refused(talking, talking.say("train", content=content))
    assert why in said and line["why"] == said


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_the_policy_forbids_is_refused_with_its_line(name: str, talk: Callable[..., Any]) -> None:
    job, changes, key = JOBS[name]
    talking = talk(**changes)
    said, line = require_refused(talking, talking.say("train", content=plain(talking.state), **job))
    assert line["why"] == said and line["rule"]["text"].startswith(f"{key} = ")
    number = line["rule"]["line"]
    assert (talking.folder / "policy.toml").read_text().splitlines()[number - 1].startswith(f"{key} = ")


# Code by its name


def test_a_strategy_of_any_module_is_not_even_imported_unless_the_policy_names_it(
    talk: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "lying_about.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    talking = talk(strategy="flwr:lying_about:Strategy")
    assert 'strategies = ["*", "flwr:*"]' in (talking.folder / "policy.toml").read_text()
    text = (talking.folder / "policy.toml").read_text().replace('["*", "flwr:*"]', '["*"]')
    (talking.folder / "policy.toml").write_text(text)
    said, line = require_refused(talking, talking.say("train", content=plain(talking.state)))
    assert line["why"] == said and line["rule"]["text"] == 'strategies = ["*"]'
    assert not mark.exists()


# Numbers that are none


NUMBERS = ("privacy.epsilon", "privacy.delta", "privacy.noise_multiplier", "privacy.clip", "train.lr", "method.alpha")


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_job_with_a_number_that_is_none_is_refused(key: str, bad: str, talk: Callable[..., Any]) -> None:
    talking = talk()
    values = json.loads(talking.config.to_json())
    section, leaf = key.split(".")
    assert leaf in values[section]
    values[section][leaf] = "HERE"
    text = json.dumps(values).replace('"HERE"', bad)
    said, line = require_refused(talking, talking.say("train", content=plain(talking.state), config=text))
    assert leaf in said and line["why"] == said


@pytest.mark.parametrize("round", [-1, 0, 4, 2**62])
def test_a_round_that_the_run_does_not_have_is_refused(round: int, talk: Callable[..., Any]) -> None:
    talking = talk()
    said, line = require_refused(talking, talking.say("train", round, content=plain(talking.state)))
    assert f"the run has no round {round} to train: it has 3" in said and line["why"] == said
