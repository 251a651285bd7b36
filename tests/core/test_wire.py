from __future__ import annotations

import inspect
import json
import zipfile
from dataclasses import asdict, replace
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import NonFiniteError, PrivateError, UserError
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import (
    METRICS,
    NEEDS_STATE,
    Answer,
    Job,
    content_bytes,
    decode_adapter,
    decode_answer,
    decode_job,
    decode_table,
    encode_adapter,
    encode_answer,
    encode_refusal,
)

SPEC = AdapterSpec("lora", (TensorSpec("a", (2, 3)), TensorSpec("b", (2,), "float64")))
STATE = AdapterState(SPEC, {"a": np.arange(6, dtype="f4").reshape(2, 3) - 2.5, "b": np.array([1e-300, -1.0])})
PRIVACY = PrivacyStatement(True, "patient", 3.5, 1e-5, 1.0, 0.8, 0.02, 12)
JOB = Job(run="r1", round=3, site="north", config="{}", fingerprint="f" * 64)


def through_flower(content: RecordDict) -> RecordDict:
    """The message as the other end gets it: serialised and parsed by Flower."""
    return recorddict_from_proto(recorddict_to_proto(content))


def full_answer() -> RecordDict:
    return encode_answer(
        "train",
        site="north",
        round=3,
        metrics={"records": 120, "steps": 6, "loss": 1.25},
        privacy=PRIVACY,
        adapter=encode_adapter(STATE, wire="fp32"),
        facts={"spec": "s", "fingerprint": "f"},
    )


def copied(content: RecordDict, **records: object) -> RecordDict:
    """``content`` with records replaced, or left out where the value is None."""
    merged = {**content, **records}
    return RecordDict({key: record for key, record in merged.items() if record is not None})


# Answers


def test_a_full_answer_survives_flower():
    content = through_flower(full_answer())
    assert decode_answer(content, "train", "node 7") == Answer(
        site="north",
        round=3,
        metrics={"records": 120, "steps": 6, "loss": 1.25},
        privacy=PRIVACY,
        facts={"spec": "s", "fingerprint": "f"},
    )
    again = decode_adapter(content, SPEC, sender="north")
    assert again == STATE


@pytest.mark.parametrize("kind", ["hello", "train", "evaluate"])
def test_every_declared_metric_crosses_and_no_other(kind, refused):
    metrics = {name: float(i) for i, name in enumerate(METRICS[kind])}
    content = through_flower(encode_answer(kind, site="north", round=0, metrics=metrics))
    assert decode_answer(content, kind, "north").metrics == metrics
    with pytest.raises(ValueError, match="metric age is not declared"):
        encode_answer(kind, site="north", round=0, metrics={"age": 1.0})
    content["metrics"]["age"] = 1.0
    with refused("north: undeclared metric `age`"):
        decode_answer(content, kind, "node 7")


def test_an_answer_may_be_bare():
    answer = decode_answer(through_flower(encode_answer("evaluate", site="north", round=1)), "evaluate", "north")
    assert answer == Answer(site="north", round=1)


def test_a_metric_of_another_kind_of_message_is_refused(refused):
    content = encode_answer("train", site="north", round=1, metrics={"loss": 1.0})
    with refused("north: undeclared metric `loss`"):
        decode_answer(content, "evaluate", "north")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, -0.5, [1.0], [], 10**400])
def test_a_metric_that_cannot_be_a_count_or_a_loss_is_refused(value, refused):
    content = copied(full_answer(), metrics=MetricRecord({"records": 1, "loss": value}))
    with refused("north: metric `loss` is"):
        decode_answer(content, "train", "node 7")


@pytest.mark.parametrize("key", ["extra", "Site", "metrics2", "evil\nrecord"])
@pytest.mark.parametrize("record", [ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord({})])
def test_an_undeclared_record_is_refused(key, record, refused):
    with refused("north: undeclared record", " ".join(key.split())):
        decode_answer(copied(full_answer(), **{key: record}), "train", "north")
    with refused("the server: undeclared record"):
        decode_job(RecordDict({"job": JOB.to_record(), key: record}))


@pytest.mark.parametrize(
    ("key", "record"),
    [
        ("site", MetricRecord({"round": 1})),
        ("metrics", ConfigRecord({"patients": "Ann, Bob"})),
        ("privacy", MetricRecord({"epsilon": 1.0})),
        ("facts", MetricRecord({"spec": 1})),
        ("adapter", ConfigRecord({"notes": "Ann"})),
        ("table", MetricRecord({"json": 1})),
    ],
)
def test_a_record_of_another_kind_is_refused(key, record, refused):
    with refused(f"north: the record `{key}` is not a"):
        decode_answer(copied(full_answer(), **{key: record}), "train", "north")


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"name": "north", "round": 3, "error": ""},
        {"name": "north", "round": 3, "error": "", "code": "", "more": 1},
        {"name": 3, "round": 3, "error": "", "code": ""},
        {"name": "north", "round": "3", "error": "", "code": ""},
        {"name": "north", "round": 3.0, "error": "", "code": ""},
        {"name": "north", "round": True, "error": "", "code": ""},
        {"name": "north", "round": 3, "error": b"", "code": ""},
        {"name": "north", "round": 3, "error": "", "code": [1]},
    ],
)
def test_an_answer_that_does_not_say_whose_it_is_is_refused(record, refused):
    content = copied(full_answer(), site=None if record is None else ConfigRecord(record))
    with refused("node 7: the answer does not say which site it is"):
        decode_answer(content, "train", "node 7")


@pytest.mark.parametrize("facts", [{"patient": "Ann"}, {"spec": 3}, {"fingerprint": b"x"}, {"spec": "s", "x": "y"}])
def test_an_undeclared_fact_is_refused(facts, refused):
    with refused("north: undeclared fact"):
        decode_answer(copied(full_answer(), facts=ConfigRecord(facts)), "train", "north")


# Privacy statements


@pytest.mark.parametrize("statement", [PRIVACY, PrivacyStatement(False), replace(PRIVACY, unit="record", clip=2)])
def test_a_privacy_statement_crosses_whole(statement):
    content = through_flower(encode_answer("train", site="north", round=1, privacy=statement))
    assert decode_answer(content, "train", "north").privacy == statement


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", 1),
        ("enabled", "true"),
        ("unit", "ward"),
        ("unit", 3),
        *((key, bad) for key in ("epsilon", "clip", "noise_multiplier") for bad in (-1.0, float("nan"), "1", True)),
        ("epsilon", float("inf")),
        ("epsilon", [1.0]),
        ("epsilon", 10**400),
        ("delta", 1.5),
        ("delta", -1e-9),
        ("sampling_rate", 1.01),
        ("steps", 1.0),
        ("steps", -1),
        ("steps", True),
        ("sampler", 1),
        ("neighbours", True),
        ("accountant", b"pld"),
        ("private_noise", 0),
    ],
)
def test_a_privacy_statement_that_cannot_be_is_refused(key, value, refused):
    record = ConfigRecord(asdict(PRIVACY) | {key: value})
    with refused(f"north: the entry `{key}` of its privacy statement is"):
        decode_answer(copied(full_answer(), privacy=record), "train", "node 7")


@pytest.mark.parametrize("change", [lambda r: r.pop("delta"), lambda r: r.update(extra=1)])
def test_a_privacy_statement_with_other_entries_is_refused(change, refused):
    values = asdict(PRIVACY)
    change(values)
    with refused("north: its privacy statement has an unknown or missing entry"):
        decode_answer(copied(full_answer(), privacy=ConfigRecord(values)), "train", "node 7")


# Refusals


def test_a_refusal_is_one_line_and_nothing_else():
    content = through_flower(encode_refusal(UserError("rank 4\nagainst 8"), site="north", round=2, code=NEEDS_STATE))
    assert list(content) == ["site"]
    answer = decode_answer(content, "train", "north")
    assert answer == Answer(site="north", round=2, error="rank 4 against 8", code=NEEDS_STATE)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NonFiniteError("tensor a holds NaN"), "tensor a holds NaN"),
        (PrivateError("row 3: Ann has HIV"), "its data cannot be used; the site's own log says why"),
        (ValueError("could not convert 'Ann'"), "ValueError at the site; the site's own log says more"),
        (KeyError("Ann"), "KeyError at the site; the site's own log says more"),
    ],
)
def test_a_refusal_quotes_no_records(error, text):
    content = encode_refusal(error, site="north", round=2)
    assert content["site"]["error"] == text
    assert "Ann" not in json.dumps(dict(content["site"]))


# Jobs


def test_a_job_survives_flower():
    content = through_flower(RecordDict({"job": JOB.to_record(), **encode_adapter(STATE, wire="fp32")}))
    assert decode_job(content) == JOB


@pytest.mark.parametrize("key", [*inspect.signature(Job).parameters])
@pytest.mark.parametrize("value", [None, 1.5, True, b"x", [1]])
def test_a_job_with_a_missing_or_mistyped_entry_is_refused(key, value, refused):
    record = JOB.to_record()
    if value is None:
        del record[key]
        with refused(f"the server's job has an unknown or missing entry `{key}`"):
            decode_job(RecordDict({"job": record}))
    else:
        record[key] = value
        with refused(f"the server's job entry `{key}` is not a"):
            decode_job(RecordDict({"job": record}))


@pytest.mark.parametrize("key", ["run", "site", "fingerprint"])
def test_a_job_of_endless_names_is_refused(key, refused):
    """They would be written into the ledger and the logs of every site."""
    record = JOB.to_record()
    record[key] = "x" * 257
    with refused(f"the server's job entry `{key}` is longer than 256 characters"):
        decode_job(RecordDict({"job": record}))


def test_a_job_with_an_extra_entry_is_refused(refused):
    record = JOB.to_record()
    record["shell"] = "rm"
    with refused("the server's job has an unknown or missing entry `shell`"):
        decode_job(RecordDict({"job": record}))


@pytest.mark.parametrize("content", [{}, {"table": ConfigRecord({})}])
def test_a_message_without_a_job_is_refused(content, refused):
    with refused("holds no job"):
        decode_job(RecordDict(content))


def test_a_job_of_another_kind_of_record_is_refused(refused):
    with refused("the server: the record `job` is not a ConfigRecord"):
        decode_job(RecordDict({"job": MetricRecord({"round": 1})}))


# Adapters


@pytest.mark.parametrize(("wire", "key"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_an_adapter_crosses_as_two_arrays_at_most(wire, key):
    content = through_flower(encode_adapter(STATE, wire=wire))
    assert set(content["adapter"]) == {key, "float64"}
    again = decode_adapter(content, SPEC, sender="north")
    # Small halves are exact in every wire dtype.
    np.testing.assert_array_equal(again["a"], STATE["a"])
    np.testing.assert_array_equal(again["b"], STATE["b"])


def test_a_part_with_its_rest_crosses():
    new = AdapterState(SPEC, {**STATE, "b": np.zeros(2)})
    content = through_flower(encode_adapter(new.only(["b"]), wire="fp32", whole=new.digest, rest=STATE.digest))
    assert decode_table(content, "the server").rest == STATE.digest
    assert decode_adapter(content, SPEC, sender="the server", held=STATE) == new
    part = through_flower(encode_adapter(new.only(["b"]), wire="fp32"))
    assert decode_adapter(part, SPEC, sender="north", names=["b"]) == new.only(["b"])


@pytest.mark.parametrize(
    "table",
    [
        None,
        ConfigRecord({}),
        ConfigRecord({"json": 3}),
        ConfigRecord({"json": "{}", "more": 1}),
        ConfigRecord({"x": "{}"}),
    ],
)
def test_a_message_without_a_table_holds_no_adapter(table, refused):
    with refused("north: the message holds no adapter"):
        decode_adapter(copied(encode_adapter(STATE, wire="fp32"), table=table), SPEC, sender="north")


def npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.npy", npy(np.zeros(6, "f4")))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        npy(STATE["a"].reshape(-1))[:-1],
        npy(STATE["a"].reshape(-1))[:20],
        archive(),
        b"\x80\x04cposix\nsystem\n.",
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (6,), }".ljust(117) + b"\n",
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,), }".ljust(117) + b"\n",
        npy(np.zeros(6, "f4, i4")),
        npy(np.zeros(7, "f4")),
        npy(STATE["a"].reshape(-1)) + b"a secret",
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(data, refused):
    content = encode_adapter(STATE, wire="fp32")
    arrays = dict(content["adapter"])
    arrays["float32"] = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=data)
    with refused("north: the packed float32 array"):
        decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north")


def test_an_array_of_another_serialisation_is_refused(refused):
    content = encode_adapter(STATE, wire="fp32")
    arrays = dict(content["adapter"])
    arrays["float32"] = Array(dtype="float32", shape=(6,), stype="pickle", data=arrays["float32"].data)
    with refused("north: the packed float32 array cannot be read"):
        decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north")


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_array_that_another_numpy_wrote_is_read_all_the_same(order):
    numbers, buffer = STATE["a"].reshape(-1).astype(f"{order}f4"), BytesIO()
    np.lib.format.write_array(buffer, numbers, version=(2, 0))
    content = encode_adapter(STATE, wire="fp32")
    arrays = {**content["adapter"], "float32": Array("float32", (6,), "numpy.ndarray", buffer.getvalue())}
    read = decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north")
    assert read == STATE


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_what_is_packed_is_what_flower_would_have_written(dtype, size):
    array = np.arange(size, dtype=dtype)
    spec = AdapterSpec("lora", (TensorSpec("a", (size,), array.dtype.name),))
    state = AdapterState(spec, {"a": array})
    content = encode_adapter(state, wire="fp32")
    assert dict(content["adapter"]) == {array.dtype.name: Array(array)}
    assert decode_adapter(content, spec, sender="north") == state


def test_a_missing_or_extra_array_is_refused(refused):
    content = encode_adapter(STATE, wire="fp32")
    with refused("north: the packed float32 array", "got nothing"):
        decode_adapter(copied(content, adapter=None), SPEC, sender="north")
    arrays = {**content["adapter"], "notes": Array(np.zeros(3, "f4"))}
    with refused("north: an array of notes that the table does not list"):
        decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north")


def test_a_non_finite_update_never_leaves_and_never_arrives(refused):
    bad = AdapterState(SPEC, {**STATE, "b": np.array([np.nan, 0])})
    with refused("tensor b holds NaN or infinity"):
        encode_adapter(bad, wire="fp32")
    content = encode_adapter(STATE, wire="fp32")
    arrays = {**content["adapter"], "float64": Array(bad["b"])}
    with refused("north: tensor b holds NaN or infinity"):
        decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north")


# Size


def test_bytes_are_those_of_arrays_and_entries():
    content = full_answer()
    arrays = sum(len(array.data) for array in content["adapter"].values())
    entries = sum(len(json.dumps(dict(content[key]))) for key in ("site", "metrics", "privacy", "facts", "table"))
    assert content_bytes(content) == arrays + entries
    more = copied(content, facts=ConfigRecord({"spec": "s" * 101, "fingerprint": "f"}))
    assert content_bytes(more) == content_bytes(content) + 100
    long = RecordDict({"job": replace(JOB, config='{"name": "ü\\n' + "x" * 5000).to_record()})
    assert content_bytes(long) == len(json.dumps(dict(long["job"])))


# Fuzz


entries = st.one_of(
    st.booleans(),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.just([]),
    st.just([1]),
)
metric_entries = st.one_of(st.integers(-5, 5), st.floats(), st.just([1.0]), st.just(10**400))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(["hello", "train", "evaluate"]))
def test_a_mutated_answer_is_refused_or_within_what_is_declared(data, kind):
    content = full_answer()
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*content, "other"]))
        action = data.draw(st.sampled_from(["drop", "entry", "record"]))
        if action == "drop":
            content.pop(key, None)
        elif action == "entry" and isinstance(content.get(key), ConfigRecord | MetricRecord) and content[key]:
            entry = data.draw(st.sampled_from([*content[key], "other"]))
            values = entries if isinstance(content[key], ConfigRecord) else metric_entries
            content[key][entry] = data.draw(values)
        else:
            config = st.dictionaries(st.text(max_size=4), entries, max_size=2).map(ConfigRecord)
            metric = st.dictionaries(st.text(max_size=4), metric_entries, max_size=2).map(MetricRecord)
            content[key] = data.draw(st.one_of(config, metric, st.just(ArrayRecord({}))))
    try:
        answer = decode_answer(content, kind, "node 7")
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert set(answer.metrics) <= set(METRICS[kind])
        assert all(np.isfinite(value) and value >= 0 for value in answer.metrics.values())
        assert set(answer.facts) <= {"spec", "fingerprint"}
        if answer.privacy is not None:
            assert answer.privacy.epsilon >= 0 and 0 <= answer.privacy.delta <= 1
    try:
        assert decode_adapter(content, SPEC, sender="node 7") == STATE
    except UserError as error:
        assert str(error).startswith("node 7: ") and str(error).isprintable()


@settings(max_examples=200)
@given(st.data())
def test_flipped_bytes_of_an_array_are_refused_or_change_nothing(data):
    content = encode_adapter(STATE, wire="fp32")
    key = data.draw(st.sampled_from([*content["adapter"]]))
    array = content["adapter"][key]
    raw = bytearray(array.data)
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    arrays = {
        **content["adapter"],
        key: Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(raw)),
    }
    try:
        assert decode_adapter(copied(content, adapter=ArrayRecord(arrays)), SPEC, sender="north") == STATE
    except UserError as error:
        assert str(error).startswith("north: ") and str(error).isprintable()
