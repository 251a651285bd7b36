"""Every message of a whole run, held against the list of what may be in one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto

JOB = {"run", "round", "site", "config", "fingerprint"}
SITE = {"name", "round", "error", "code"}
TABLE = {"version", "spec", "state", "rest", "wire", "tensors", "freeze", "local", "receive", "extras"} | {
    *("form", "steps", "kept", "coded"),
}
FACTS = {"spec", "fingerprint"}
PRIVACY = {
    *("enabled", "unit", "epsilon", "delta", "clip", "noise_multiplier", "sampling_rate", "steps"),
    *("sampler", "neighbours", "accountant", "private_noise", "metrics", "ledger"),
}
COUNTS = {"examples", "correct", "loss_sum"}
FACTOR_A = re.compile(
    r"base_model\.model\.bert\.encoder\.layer\.\d\.attention\.self\.(query|value)\.lora_A\.default\.weight"
)
FACTOR_B = re.compile(FACTOR_A.pattern.replace("lora_A", "lora_B"))
HEAD = re.compile(r"base_model\.model\.classifier\.modules_to_save\.default\.(weight|bias)")


@dataclass(frozen=True)
class Sent:
    """One message: its kind, which site it is to or from, its content, and all its bytes as Flower sends them."""

    kind: str
    site: str
    content: RecordDict
    raw: bytes

    @property
    def table(self) -> dict[str, Any]:
        return json.loads(str(self.content.config_records["table"]["json"]))

    @property
    def tensors(self) -> set[str]:
        return {name for name, _ in self.table["tensors"]}

    @property
    def numbers(self) -> int:
        return sum(array.numpy().size for array in self.content.array_records["adapter"].values())


@dataclass(frozen=True)
class Recording:
    down: list[Sent]
    up: list[Sent]
    result: dict[str, Any]
    output: Path

    def of(self, kind: str) -> tuple[list[Sent], list[Sent]]:
        return [m for m in self.down if m.kind == kind], [m for m in self.up if m.kind == kind]


def _sent(message: Message, site: str) -> Sent:
    return Sent(
        message.metadata.message_type,
        site,
        copy.deepcopy(message.content),
        message_to_proto(message).SerializeToString(),
    )


@pytest.fixture(scope="module", params=["fedit", "ffa", "fedit-dp", "ffa-dp"])
def recording(request: pytest.FixtureRequest, tiny_federation: Any, tmp_path_factory: Any) -> Recording:
    strategy, _, private = request.param.partition("-")
    make = tiny_federation.private if private else tiny_federation.config
    config = make(strategy=strategy)
    down: list[Sent] = []
    up: list[Sent] = []

    def listen(site: str, message: Message, answer: Callable[[], Message]) -> Message:
        down.append(_sent(message, site))
        reply = answer()
        up.append(_sent(reply, site))
        return reply

    output = tmp_path_factory.mktemp("recorded") / request.param
    return Recording(down, up, tiny_federation.run(config, output, listen), output)


def _private(recording: Recording) -> bool:
    return bool(recording.result["config"]["privacy"]["enabled"])


def test_all_messages_are_seen(recording: Recording, tinyfederation: Any) -> None:
    sites, rounds = len(tinyfederation.SITES), recording.result["rounds"]
    assert rounds == 3
    kinds = [message.kind for message in recording.down]
    assert kinds == [message.kind for message in recording.up]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "query.hello": sites,
        "train": sites * rounds,
        "evaluate": sites * (rounds + 1),
    }


def test_an_instruction_holds_the_declared_records_and_keys_alone(recording: Recording) -> None:
    for message in recording.down:
        wanted = {"job"} if message.kind == "query.hello" else {"job", "adapter", "table"}
        assert set(message.content) == wanted
        assert type(message.content["job"]) is ConfigRecord
        assert set(message.content["job"]) == JOB
        if "adapter" in wanted:
            assert set(message.content["table"]) == {"json"}
            assert set(message.table) == TABLE
            assert set(message.content["adapter"]) == ({"float32"} if message.tensors else set())


def test_an_answer_holds_the_declared_records_keys_and_metrics_alone(recording: Recording) -> None:
    private = _private(recording)
    trained = 0
    for message in recording.up:
        content = message.content
        records: dict[str, type] = {"site": ConfigRecord, "metrics": MetricRecord}
        if message.kind == "query.hello":
            records["facts"] = ConfigRecord
            metrics = {"records", "held_out", "units"}
        elif message.kind == "train":
            trained += 1
            records |= {"adapter": ArrayRecord, "table": ConfigRecord}
            # The training loss is a sum over records without noise: it leaves only where nothing was promised.
            metrics = {"records", "steps"} if private else {"records", "steps", "loss"}
        else:
            metrics = COUNTS
        if private and (message.kind == "train" or (message.kind == "evaluate" and trained)):
            records["privacy"] = ConfigRecord
        assert {key: type(record) for key, record in content.items()} == records
        assert set(content["site"]) == SITE
        assert (content["site"]["name"], content["site"]["error"], content["site"]["code"]) == (message.site, "", "")
        assert set(content["metrics"]) == metrics
        if "facts" in records:
            assert set(content["facts"]) == FACTS
        if "privacy" in records:
            assert set(content["privacy"]) == PRIVACY
            assert content["privacy"]["enabled"] is True
        if "table" in records:
            assert set(content["table"]) == {"json"}
            assert set(message.table) == TABLE
            assert set(content["adapter"]) == {"float32"}


def test_an_answer_holds_the_shared_trainables_alone(recording: Recording) -> None:
    frozen = recording.result["strategy"]["name"] == "ffa"
    answers = recording.of("train")[1]
    for message in answers:
        kinds = [sum(bool(kind.fullmatch(name)) for name in message.tensors) for kind in (FACTOR_A, FACTOR_B, HEAD)]
        assert kinds == ([0, 4, 2] if frozen else [4, 4, 2])
        assert sum(kinds) == len(message.tensors)
        # Not a number more than the named tensors hold.
        assert message.numbers == sum(int(np.prod(shape)) for _, shape in message.table["tensors"])
        assert message.numbers == recording.result["adapter"]["shared"]


def test_the_bytes_of_an_answer_are_its_arrays_and_little_more(recording: Recording) -> None:
    # Nothing can hide where the records do not show it: header, table and statement are a few kilobytes.
    for message in recording.up:
        arrays = message.numbers * 4 if "adapter" in message.content else 0
        assert len(message.raw) < arrays + 4000


def test_nothing_of_a_record_is_in_any_byte_that_leaves_a_site(recording: Recording, tiny_federation: Any) -> None:
    everything = b"\n".join(message.raw for message in recording.up).lower()
    # The search finds what is there.
    assert all(site.encode() in everything for site in recording.result["sites"])
    assert b"lora_b" in everything
    telling = {word for row in tiny_federation.rows for word in (row["patient"], row["label"], row["text"])}
    telling |= {row["text"].split()[-1] for row in tiny_federation.rows}
    assert len(telling) > 1400
    for text in telling:
        assert text.lower().encode() not in everything
    assert str(tiny_federation.table).encode() not in everything


def test_no_words_of_a_record_reach_the_server_or_its_files(recording: Recording, tiny_federation: Any) -> None:
    """The run directory, but for the configuration's label set, tells no record either."""
    words = [row[key] for row in tiny_federation.rows for key in ("patient", "text")]
    words += [row["text"].split()[-1] for row in tiny_federation.rows]
    files = [path for path in recording.output.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if word.encode() in content], path


def test_an_adapter_that_a_site_holds_is_not_sent_again(recording: Recording) -> None:
    frozen = recording.result["strategy"]["name"] == "ffa"
    total = recording.result["adapter"]["parameters"]
    for site in recording.result["sites"]:
        mine = [message for message in recording.down if message.site == site and "table" in message.content]
        first, *later = mine
        assert first.kind == "evaluate"
        assert first.numbers == total
        assert first.table["rest"] == ""
        for before, message in zip(mine, later, strict=False):
            if message.kind == "train":
                # Its state is the one just evaluated: only the name of it travels.
                assert message.tensors == set()
                assert message.numbers == 0
                assert message.table["rest"] == message.table["state"] == before.table["state"]
            else:
                assert message.numbers == (recording.result["adapter"]["shared"] if frozen else total)
                # Where every tensor has changed, nothing needs to be held.
                assert message.table["rest"] == (before.table["state"] if frozen else "")


def test_a_frozen_factor_goes_down_once_a_site_and_never_up(recording: Recording) -> None:
    frozen = recording.result["strategy"]["name"] == "ffa"
    with_a = [m for m in recording.of("train")[1] if any(FACTOR_A.fullmatch(name) for name in m.tensors)]
    assert len(with_a) == (0 if frozen else 9)
    for site in recording.result["sites"]:
        carried = [
            message.kind
            for message in recording.down
            if message.site == site and "table" in message.content
            if any(FACTOR_A.fullmatch(name) for name in message.tensors)
        ]
        assert carried == ["evaluate"] * (1 if frozen else 4)


def test_the_final_adapter_is_what_the_answers_average_to(recording: Recording) -> None:
    """The recording is of this run: the last answers, weighted by records, are the adapter that run.json names."""
    last = recording.of("train")[1][-3:]
    weights = [float(message.content["metrics"]["records"]) for message in last]
    vectors = [message.content.array_records["adapter"]["float32"].numpy() for message in last]
    mean = sum(w * v.astype(np.float64) for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    evaluated = recording.of("evaluate")[0][-1]
    sent = evaluated.content.array_records["adapter"]["float32"].numpy()
    np.testing.assert_allclose(mean, sent, rtol=0, atol=1e-6)
    assert evaluated.table["state"] == recording.result["digest"]


def test_the_bytes_in_the_run_record_are_the_payload_of_these_messages(recording: Recording) -> None:
    arrays_up = sum(len(a.data) for m in recording.up if "adapter" in m.content for a in m.content["adapter"].values())
    arrays_down = sum(
        len(a.data) for m in recording.down if "adapter" in m.content for a in m.content["adapter"].values()
    )
    for counted, arrays, messages in (
        (recording.result["bytes_up"], arrays_up, [m for m in recording.up if m.kind != "query.hello"]),
        (recording.result["bytes_down"], arrays_down, [m for m in recording.down if m.kind != "query.hello"]),
    ):
        assert arrays < counted
        # Counted as JSON where Flower sends protobuf.
        assert counted == pytest.approx(sum(len(message.raw) for message in messages), rel=0.1)
