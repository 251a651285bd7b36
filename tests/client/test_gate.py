"""The gate: whatever an answer was made of, only what is declared, allowed and covered leaves the site."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedgraft.client.gate import GateError, left, require_allowed, require_masked, require_refusal, require_step
from fedgraft.client.policy import TEMPLATE, Policy, PolicyError
from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import STEPS, encode_adapter, encode_answer, encode_masked, encode_refusal, encode_secure

FINGERPRINT = "ab" * 32
POLICY = TEMPLATE.replace("base_models = []", f'base_models = ["{FINGERPRINT}"]').replace('"*classifier*"', '"head"')
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("x.lora_A.w", (2, 3)),
        TensorSpec("x.lora_B.w", (3, 2)),
        TensorSpec("head", (4,)),
        TensorSpec("frozen", (3,), policy="freeze"),
        TensorSpec("own", (3,), policy="local"),
    ),
)
STATE = AdapterState(SPEC, {t.name: np.full(t.shape, 0.5, np.float32) for t in SPEC.tensors})
SHARED = SPEC.select("share")
STATEMENT = PrivacyStatement(
    True, "patient", 2.0, 1e-5, clip=1.0, noise_multiplier=1.0, sampling_rate=0.1, steps=3, metrics="noised"
)


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.private(**{"privacy.epsilon": 4.0, "privacy.delta": 1e-5, "evaluate.release": "noised"})


@pytest.fixture
def gate(config: RunConfig) -> Callable[..., None]:
    """``gate(kind, content)``: raises unless the answer passes."""

    def pass_through(kind: Any, content: RecordDict, policy: str = POLICY, run: RunConfig = config) -> None:
        rules = Policy(policy, "/srv/policy.toml")
        require_allowed(
            kind,
            content,
            config=run,
            policy=rules,
            dataset=rules.datasets[0],
            fingerprint=FINGERPRINT,
            received=STATE if kind == "train" else None,
        )

    return pass_through


def hello(**changes: Any) -> RecordDict:
    values: dict[str, Any] = {
        "metrics": {"records": 90, "held_out": 10, "units": 70},
        "facts": {"spec": "0123456789abcdef", "fingerprint": FINGERPRINT},
        "privacy": None,
    }
    return encode_answer("hello", site="north", round=1, **{**values, **changes})


def update(state: AdapterState | None = None, **changes: Any) -> RecordDict:
    values: dict[str, Any] = {"metrics": {"records": 90, "steps": 3}, "privacy": STATEMENT}
    packed = encode_adapter(state if state is not None else STATE.only(SHARED), wire=changes.pop("wire", "fp32"))
    return encode_answer("train", site="north", round=1, adapter=packed, **{**values, **changes})


def counts(**changes: Any) -> RecordDict:
    values: dict[str, Any] = {"metrics": {"examples": 10, "correct": 4, "loss_sum": 9.5}, "privacy": STATEMENT}
    return encode_answer("evaluate", site="north", round=1, **{**values, **changes})


def test_what_is_declared_allowed_and_covered_passes(gate: Callable[..., None]) -> None:
    gate("hello", hello())
    gate("hello", hello(privacy=STATEMENT))
    for wire in ("fp32", "fp16", "bf16"):
        gate("train", update(wire=wire))
    gate("evaluate", counts())
    gate("evaluate", counts(metrics={}))


# Records


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("records", ConfigRecord({"text": "jane doe"})),
        ("metrics2", MetricRecord({"loss": 1.0})),
        ("extra", ArrayRecord({"x": Array(np.zeros(2))})),
    ],
)
@pytest.mark.parametrize("make", [hello, update, counts])
def test_an_undeclared_record_does_not_leave(
    gate: Callable[..., None], make: Callable[[], RecordDict], name: str, record: Any
) -> None:
    content = make()
    content[name] = record
    with pytest.raises(GateError, match=f"the site's gate held its answer back: .*undeclared record `{name}`"):
        gate({hello: "hello", update: "train", counts: "evaluate"}[make], content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "north", "round": 1, "error": "jane doe", "code": ""}, "a refusal that carries more than its text"),
        ({"name": "north", "round": 1, "error": "", "code": "", "note": "x"}, "does not say which site it is"),
    ],
)
def test_text_does_not_leave_beside_an_answer(gate: Callable[..., None], change: dict[str, Any], reason: str) -> None:
    content = update()
    content["site"] = ConfigRecord(change)
    with pytest.raises(GateError, match=reason):
        gate("train", content)


def test_facts_are_digests_and_leave_with_a_greeting_alone(gate: Callable[..., None]) -> None:
    for facts in (
        {"spec": "jane doe", "fingerprint": FINGERPRINT},
        {"spec": "0123", "fingerprint": "another"},
        {"spec": "0123"},
        {},
        {"spec": "0123", "fingerprint": FINGERPRINT, "more": "x"},
    ):
        with pytest.raises(GateError, match="fact"):
            gate("hello", hello(facts=facts))
    with pytest.raises(GateError, match="facts, which only a greeting does"):
        gate("evaluate", counts(facts={"spec": "0123", "fingerprint": FINGERPRINT}))


# Tensors


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((*SHARED, "frozen"), "tensor frozen is not among the declared tensors"),
        ((*SHARED, "own"), "tensor own is not among the declared tensors"),
        (SHARED[:2], "tensor head is missing"),
    ],
)
def test_the_shared_tensors_leave_no_more_and_no_fewer(
    gate: Callable[..., None], names: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(GateError, match=reason):
        gate("train", update(STATE.only(names)))


def test_an_answer_that_calls_a_personal_tensor_shared_does_not_leave(gate: Callable[..., None]) -> None:
    generous = STATE.with_spec(SPEC.with_policy("share", lambda t: t.name == "own"))
    with pytest.raises(GateError, match="held its answer back"):
        gate("train", update(generous.only((*SHARED, "own"))))
    quiet = STATE.with_spec(SPEC.with_policy("share", lambda t: True)).only(SHARED)
    with pytest.raises(GateError, match="says otherwise than the run which tensors are shared"):
        gate("train", update(quiet))


def test_a_tensor_that_the_policy_does_not_list_does_not_leave(gate: Callable[..., None]) -> None:
    with pytest.raises(PolicyError, match=r"line 20 \(tensors = .*would carry the tensor head out"):
        gate("train", update(), POLICY.replace('"head"', '"tail"'))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_number_that_is_none_does_not_leave(gate: Callable[..., None], value: float, wire: str) -> None:
    content = update(wire=wire)
    (key,) = content.array_records["adapter"]
    numbers = content.array_records["adapter"][key].numpy().copy()
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    numbers[3] = bits.astype(np.uint16).view(np.int16)[0] if wire == "bf16" else value
    content["adapter"] = ArrayRecord({key: Array(numbers)})
    with pytest.raises(GateError, match="NaN or infinity"):
        gate("train", content)


def test_numbers_beyond_those_of_the_tensors_do_not_leave(gate: Callable[..., None]) -> None:
    content = update()
    numbers = content.array_records["adapter"]["float32"].numpy()
    content["adapter"] = ArrayRecord({"float32": Array(np.append(numbers, np.float32(1)))})
    with pytest.raises(GateError, match="the packed float32 array should be"):
        gate("train", content)
    content["adapter"] = ArrayRecord({"float32": Array(numbers), "float64": Array(np.zeros(9))})
    with pytest.raises(GateError, match="an array of float64 that the table does not list"):
        gate("train", content)


def test_an_adapter_leaves_after_training_alone(gate: Callable[..., None]) -> None:
    for kind, content in (("hello", hello()), ("evaluate", counts())):
        for key in ("adapter", "table"):
            spoilt = RecordDict(dict(content.items()))
            spoilt[key] = update()[key]
            with pytest.raises(GateError, match="an adapter, though nothing was trained"):
                gate(kind, spoilt)
    without = update()
    del without["table"]
    with pytest.raises(GateError, match="holds no adapter"):
        gate("train", without)


# Metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_metric_is_a_finite_count(gate: Callable[..., None], value: float) -> None:
    content = counts()
    content["metrics"] = MetricRecord({"examples": 10, "correct": value})
    with pytest.raises(GateError, match="metric `correct` is"):
        gate("evaluate", content)


def test_a_metric_of_another_kind_of_answer_does_not_leave(gate: Callable[..., None]) -> None:
    content = update()
    content["metrics"] = MetricRecord({"records": 90, "correct": 3})
    with pytest.raises(GateError, match="undeclared metric `correct`"):
        gate("train", content)


def test_a_training_loss_never_leaves_beside_privacy(gate: Callable[..., None], tiny_federation: Any) -> None:
    lossy = {"records": 90, "steps": 3, "loss": 0.7}
    open_handed = POLICY.replace("dp = true", "dp = false")
    with pytest.raises(GateError, match="a training loss, which no noise protects"):
        gate("train", update(metrics=lossy), open_handed)
    plain = tiny_federation.config()
    with pytest.raises(PolicyError, match=r"line 25 \(training_loss = \"none\"\): the answer tells the training loss"):
        gate("train", update(metrics=lossy, privacy=None), open_handed, plain)
    gate("train", update(metrics=lossy, privacy=None), open_handed.replace('loss = "none"', 'loss = "exact"'), plain)


@pytest.mark.parametrize("told", ["exact_not_private", "none"])
def test_counts_leave_in_the_form_that_the_run_asked_for(gate: Callable[..., None], told: str) -> None:
    with pytest.raises(GateError, match=f"its counts are {told}, the run asks for noised"):
        gate("evaluate", counts(privacy=replace(STATEMENT, metrics=told)))
    with pytest.raises(GateError, match="its counts are exact_not_private, the run asks for noised"):
        gate("evaluate", counts(privacy=None))


def test_counts_leave_in_the_form_that_the_policy_allows(gate: Callable[..., None], tiny_federation: Any) -> None:
    exact = tiny_federation.private(**{"privacy.delta": 1e-5, "evaluate.release": "exact_not_private"})
    content = counts(privacy=replace(STATEMENT, metrics="exact_not_private"))
    with pytest.raises(PolicyError, match=r"line 24 \(evaluation = \"noised\"\): the answer's counts are exact"):
        gate("evaluate", content, POLICY, exact)
    gate("evaluate", content, POLICY.replace('evaluation = "noised"', 'evaluation = "exact"'), exact)
    with pytest.raises(PolicyError, match=r"line 24 \(evaluation = \"none\"\): the answer's counts are noised"):
        gate("evaluate", counts(), POLICY.replace('evaluation = "noised"', 'evaluation = "none"'))


@pytest.mark.parametrize("make", [hello, update])
def test_sizes_stay_where_the_policy_keeps_them(gate: Callable[..., None], make: Callable[[], RecordDict]) -> None:
    with pytest.raises(PolicyError, match=r"line 26 \(sizes = \"none\"\)"):
        gate("hello" if make is hello else "train", make(), POLICY.replace('sizes = "exact"', 'sizes = "none"'))


# The statement


@pytest.mark.parametrize("statement", [None, PrivacyStatement(enabled=False)])
def test_an_update_without_a_privacy_statement_does_not_leave(
    gate: Callable[..., None], statement: PrivacyStatement | None
) -> None:
    with pytest.raises(PolicyError, match=r"line 29 \(dp = true\): the update carries no privacy statement"):
        gate("train", update(privacy=statement))
    # Even where the policy would not mind, the run promised one.
    with pytest.raises(GateError, match="the update carries no privacy statement"):
        gate("train", update(privacy=statement), POLICY.replace("dp = true", "dp = false"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epsilon": 8.1}, r"line 11 \(max_epsilon = 8\): the statement's epsilon is 8.1"),
        ({"delta": 1e-4}, r"line 13 \(max_delta = 1e-05\): the statement's delta is 0.0001"),
        ({"unit": "record"}, r"line 9 \(min_unit = \"patient\"\): each record alone is protected"),
        ({"private_noise": False}, r"line 30 \(secret_noise = true\): noise on these data once came from a seed"),
    ],
)
@pytest.mark.parametrize("make", [hello, update, counts])
def test_a_statement_beyond_the_policy_keeps_everything_in(
    gate: Callable[..., None], make: Callable[..., RecordDict], change: dict[str, Any], reason: str
) -> None:
    kind = {hello: "hello", update: "train", counts: "evaluate"}[make]
    with pytest.raises(PolicyError, match=reason):
        gate(kind, make(privacy=replace(STATEMENT, **change)))


# Refusals, and what is written down


def test_a_refusal_is_its_text_and_nothing_else() -> None:
    refusal = encode_refusal(UserError("no"), site="north", round=1)
    require_refusal(refusal)
    for spoil in (
        lambda content: content.update(metrics=MetricRecord({"records": 1})),
        lambda content: content.update(site=ConfigRecord({**content["site"], "note": "x"})),
        lambda content: content.pop("site"),
    ):
        content = RecordDict(dict(refusal.items()))
        spoil(content)
        with pytest.raises(GateError, match="a refusal carries more than its text"):
            require_refusal(content)


def test_what_left_is_told_without_its_numbers() -> None:
    told = left(update())
    assert told["tensors"] == {"x.lora_A.w": [2, 3], "x.lora_B.w": [3, 2], "head": [4]}
    assert told["metrics"] == {"records": 90, "steps": 3}
    assert (told["privacy"]["epsilon"], told["privacy"]["delta"], told["wire"]) == (2.0, 1e-5, "fp32")
    assert told["bytes"] > 4 * 16
    assert "0.5" not in json.dumps(told["tensors"])
    json.dumps(told, allow_nan=False)
    assert set(left(hello())) == {"bytes", "sha256_of_content", "metrics", "facts"}


def test_the_digest_of_what_left_hangs_on_every_part_of_it() -> None:
    other = AdapterState(SPEC, {**STATE, "head": np.array([0.5, 0.5, 0.5, 0.25], np.float32)})
    contents = [
        update(),
        update(other.only(SHARED)),
        update(wire="fp16"),
        update(metrics={"records": 91, "steps": 3}),
        update(privacy=replace(STATEMENT, epsilon=2.1)),
        hello(),
        hello(facts={"spec": "1", "fingerprint": FINGERPRINT}),
    ]
    digests = [left(content)["sha256_of_content"] for content in contents]
    assert len(set(digests)) == len(contents)
    assert left(update())["sha256_of_content"] == digests[0]


# A secure sum


MASKED = np.arange(19, dtype=np.uint64)


def masked(entries: np.ndarray = MASKED, **changes: Any) -> RecordDict:
    values: dict[str, Any] = {"metrics": {"steps": 3}, "privacy": STATEMENT, "adapter": encode_masked(entries)}
    return encode_answer("train", site="north", round=1, **{**values, **changes})


def step(kind: Any, message: bytes = b"shares") -> RecordDict:
    return encode_answer(kind, site="north", round=1, adapter=encode_secure(message))


def test_the_answers_of_a_secure_sum_pass() -> None:
    require_masked(masked(), 19, MASKED.dtype)
    require_masked(masked(privacy=None), 19, MASKED.dtype)
    for kind in STEPS:
        require_step(kind, step(kind))


@pytest.mark.parametrize("make", [hello, update, counts])
@pytest.mark.parametrize("part", [encode_secure(b"x"), encode_masked(MASKED)], ids=["secure", "masked"])
def test_no_other_answer_carries_a_part_of_one(
    gate: Callable[..., None], make: Callable[[], RecordDict], part: RecordDict
) -> None:
    content = RecordDict({**make(), **part})
    with pytest.raises(GateError, match="part of a secure sum"):
        gate({hello: "hello", update: "train", counts: "evaluate"}[make], content)


@pytest.mark.parametrize(
    "content",
    [
        masked(metrics={"steps": 3, "records": 90}),
        masked(metrics={"steps": 3, "loss": 0.1}),
        masked(metrics={}),
        masked(facts={"spec": "ab"}),
        masked(MASKED[:-1]),
        masked(MASKED.astype(np.uint32)),
        RecordDict({**masked(), **encode_adapter(STATE.only(SHARED), wire="fp32")}),
        RecordDict({**masked(), **encode_secure(b"more")}),
        RecordDict({**masked(), "extra": ConfigRecord({"text": "jane doe"})}),
        update(),
    ],
)
def test_a_masked_update_carries_its_numbers_and_nothing_else(content: RecordDict) -> None:
    with pytest.raises(GateError):
        require_masked(content, 19, MASKED.dtype)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_of_it_carries_one_message_and_nothing_else(kind: Any) -> None:
    for content in (
        step(kind, bytes(2_000_000)),
        RecordDict({**step(kind), **encode_masked(MASKED)}),
        RecordDict({**step(kind), "metrics": MetricRecord({"records": 90})}),
        RecordDict({**step(kind), "privacy": update()["privacy"]}),
        encode_answer(kind, site="north", round=1),
    ):
        with pytest.raises(GateError):
            require_step(kind, content)


def test_the_audit_log_tells_of_masked_numbers_without_the_weight() -> None:
    told = left(masked())
    assert told["masked"] == {"entries": 19, "dtype": "uint64"}
    assert told["metrics"] == {"steps": 3} and "tensors" not in told
