"""The Flower strategy by itself: what it sends, what it takes from an answer, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import NEEDS_STATE, content_bytes, encode_adapter, encode_answer, encode_refusal
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.flower import PeftStrategy

SITES = {2: "east", 3: "north", 4: "south"}
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 3), role="lora_A", policy="freeze"),
        TensorSpec("b", (3, 2), role="lora_B"),
        TensorSpec("head", (2,), role="head"),
        TensorSpec("own", (1,), policy="local"),
    ),
)
PROMISE = PrivacyStatement(
    enabled=True, unit="patient", epsilon=1.5, delta=1e-4, clip=1.0, noise_multiplier=1.1, sampling_rate=0.1, steps=9
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    # Flower sets it in the processes that it starts; a message outside of them has no sender without it.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def state(fill: float) -> AdapterState:
    return AdapterState(SPEC, {t.name: np.full(t.shape, fill, np.float32) for t in SPEC.tensors})


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m",
        "privacy": {"enabled": False},
        "data": {"path": "d.csv", "sites": list(SITES.values())},
        "server": {"quorum": 1, "round_timeout": 7},
    }
    return parse_config({**values, **changes})


def private(**changes: Any) -> RunConfig:
    return config(privacy={"unit": "patient", "epsilon": 2.0, "delta": 1e-4, **changes})


def make(settings: RunConfig | None = None, start: AdapterState | None = None) -> PeftStrategy:
    strategy = PeftStrategy(
        create_aggregator("fedit"), start or state(0), settings or config(), run="r", fingerprint="f" * 64
    )
    strategy.sites = dict(SITES)
    return strategy


def train(strategy: PeftStrategy, number: int = 1) -> list[Message]:
    return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def evaluate(strategy: PeftStrategy, number: int = 1) -> list[Message]:
    return list(strategy.configure_evaluate(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def update(site: str, fill: float, records: int = 10, number: int = 1, **more: Any) -> RecordDict:
    shared = state(fill).only(["b", "head"])
    metrics = {"records": records, "steps": 3, **more.pop("metrics", {})}
    packed = encode_adapter(shared, wire="fp32")
    return encode_answer("train", site=site, round=number, metrics=metrics, adapter=packed, **more)


def replies(messages: list[Message], **content: RecordDict) -> Iterator[Message]:
    """Answers of the sites named, in the order of the instructions."""
    for message in messages:
        site = SITES[message.metadata.dst_node_id]
        if site in content:
            yield Message(content[site], reply_to=message)


def table(content: RecordDict) -> dict[str, Any]:
    return json.loads(str(content.config_records["table"]["json"]))


def set_table(content: RecordDict, **changes: Any) -> None:
    content["table"] = ConfigRecord({"json": json.dumps({**table(content), **changes})})


# What goes out


def test_instructions_go_out_in_the_order_of_the_sites_names_whatever_their_nodes() -> None:
    strategy = make()
    strategy.sites = {9: "north", 5: "south", 7: "east"}
    messages = train(strategy, 4)
    assert [message.metadata.dst_node_id for message in messages] == [7, 9, 5]
    for message, site in zip(messages, ("east", "north", "south"), strict=True):
        job = message.content.config_records["job"]
        assert dict(job) == {
            "run": "r",
            "round": 4,
            "site": site,
            "config": strategy.config.to_json(),
            "fingerprint": "f" * 64,
        }
        assert message.metadata.message_type == "train"
        assert message.metadata.group_id == "4"
        assert message.metadata.ttl == 7


def test_so_many_sites_as_asked_for_train_in_a_round_drawn_from_seed_and_round_alone() -> None:
    def drawn(seed: int, number: int) -> tuple[str, ...]:
        strategy = make(config(seed=seed, server={"sites_per_round": 2}))
        sites = tuple(SITES[message.metadata.dst_node_id] for message in train(strategy, number))
        assert sorted((*sites, *strategy.phase.resting)) == sorted(SITES.values())
        return sites

    rounds = [drawn(1, number) for number in range(1, 301)]
    assert {len(set(sites)) for sites in rounds} == {2}
    assert rounds[6] == drawn(1, 7)
    assert rounds != [drawn(2, number) for number in range(1, 301)]
    # A pair comes in a third of the rounds: 100 of 300, standard deviation 8.
    for pair in {("east", "north"), ("east", "south"), ("north", "south")}:
        assert abs(rounds.count(pair) - 100) < 40


def test_who_rests_in_a_round_is_evaluated_all_the_same() -> None:
    strategy = make(config(server={"sites_per_round": 1}))
    (only,) = train(strategy)
    assert strategy.phase.resting == tuple(s for node, s in SITES.items() if node != only.metadata.dst_node_id)
    assert len(evaluate(strategy)) == 3


def test_a_round_in_which_all_drawn_sites_answered_stands_whatever_the_quorum() -> None:
    strategy = make(config(server={"sites_per_round": 1, "quorum": 0}), state(5))
    (only,) = train(strategy)
    site = SITES[only.metadata.dst_node_id]
    assert strategy.aggregate_train(1, list(replies([only], **{site: update(site, 2)}))) != (None, None)
    assert strategy.state["b"].tolist() == state(2)["b"].tolist()


def test_instructions_are_made_as_they_are_taken() -> None:
    strategy = make()
    messages = iter(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]
    assert strategy.phase.bytes_down == 0
    taken = [next(messages)]
    first = strategy.phase.bytes_down
    assert first == content_bytes(taken[0].content)
    taken += messages
    assert strategy.phase.bytes_down == sum(content_bytes(message.content) for message in taken) > 2 * first


def test_what_a_site_holds_is_named_and_not_sent() -> None:
    strategy = make(start=state(1))
    first = evaluate(strategy)
    assert [name for name, _ in table(first[0].content)["tensors"]] == ["a", "b", "head", "own"]
    second = train(strategy)
    for message in second:
        entry = table(message.content)
        assert (entry["tensors"], entry["rest"], entry["state"]) == ([], strategy.state.digest, strategy.state.digest)
    everything = {site: update(site, 2) for site in SITES.values()}
    strategy.collect(replies(second, **everything))
    before = strategy.state
    assert strategy.finish_train()
    entry = table(evaluate(strategy)[0].content)
    assert [name for name, _ in entry["tensors"]] == ["b", "head"]
    assert (entry["rest"], entry["state"]) == (before.digest, strategy.state.digest)


def test_a_site_that_failed_is_sent_everything_again() -> None:
    strategy = make()
    messages = evaluate(strategy)
    answer = encode_answer("evaluate", site="east", round=1, metrics={"examples": 1, "correct": 1, "loss_sum": 1})
    strategy.collect(replies(messages, east=answer, north=encode_refusal(UserError("no"), site="north", round=1)))
    strategy.totals()
    sent = {SITES[m.metadata.dst_node_id]: table(m.content)["tensors"] for m in train(strategy)}
    assert sent["east"] == []
    assert len(sent["north"]) == len(sent["south"]) == 4


# What comes in


def test_the_next_adapter_is_the_mean_weighted_by_records_and_the_rest_stays() -> None:
    strategy = make(start=state(5))
    messages = train(strategy)
    strategy.collect(replies(messages, east=update("east", 1, 10), north=update("north", 4, 20)))
    assert strategy.finish_train()
    assert set(np.unique(strategy.state["b"])) == {3.0}
    assert set(np.unique(strategy.state["head"])) == {3.0}
    assert set(np.unique(strategy.state["a"])) == set(np.unique(strategy.state["own"])) == {5.0}
    assert strategy.phase.missing == {"south": "no answer in 7 s"}
    assert strategy.record(1.23456)["seconds"] == 1.235


def test_the_order_of_the_answers_changes_nothing() -> None:
    digests = set()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        strategy = make()
        messages = train(strategy)
        answers = list(
            replies(
                messages, east=update("east", 0.1, 3), north=update("north", 0.7, 5), south=update("south", 1e-8, 11)
            )
        )
        strategy.collect([answers[i] for i in order])
        assert strategy.finish_train()
        digests.add(strategy.state.digest)
    assert len(digests) == 1


def test_flowers_own_loop_gets_the_packed_adapter_and_the_sums() -> None:
    strategy = make()
    arrays, numbers = strategy.aggregate_train(1, list(replies(train(strategy), east=update("east", 2))))
    assert arrays is not None and numbers is not None
    assert arrays["float32"].numpy().size == SPEC.parameters
    assert dict(numbers) == {"sites": 1}
    counts = {"examples": 4, "correct": 3, "loss_sum": 2.5}
    answers = {s: encode_answer("evaluate", site=s, round=1, metrics=counts) for s in ("east", "south")}
    totals = strategy.aggregate_evaluate(1, list(replies(evaluate(strategy), **answers)))
    assert totals is not None
    assert dict(totals) == {"examples": 8, "correct": 6, "loss_sum": 5.0}
    line = strategy.record(0.0)
    assert (line["accuracy"], line["loss"], line["examples"]) == (0.75, 0.625, 8)
    strategy.summary()


def test_below_the_quorum_nothing_changes() -> None:
    strategy = make(config(server={"quorum": 2}), state(5))
    before = strategy.state
    assert strategy.aggregate_train(1, list(replies(train(strategy), east=update("east", 2)))) == (None, None)
    assert strategy.state is before


def test_sites_that_release_no_counts_give_no_accuracy() -> None:
    strategy = make()
    answers = {s: encode_answer("evaluate", site=s, round=1) for s in SITES.values()}
    assert strategy.aggregate_evaluate(1, list(replies(evaluate(strategy), **answers))) is None
    line = strategy.record(0.0)
    assert (line["accuracy"], line["loss"], line["examples"], line["missing"]) == (None, None, 0, {})


def test_a_site_without_the_adapter_gets_it_in_the_same_round() -> None:
    strategy = make()
    list(evaluate(strategy))
    first = train(strategy)
    refusal = encode_refusal(UserError("not held here"), site="north", round=1, code=NEEDS_STATE)
    strategy.collect(replies(first, east=update("east", 1), north=refusal, south=update("south", 1)))
    strategy.collect(replies(first, north=refusal))
    again = list(strategy.second_chances())
    assert [SITES[message.metadata.dst_node_id] for message in again] == ["north"]
    assert len(table(again[0].content)["tensors"]) == 4
    strategy.collect(replies(again, north=update("north", 4)))
    assert strategy.finish_train()
    assert strategy.phase.missing == {}
    assert set(np.unique(strategy.state["b"])) == {2.0}
    assert list(strategy.second_chances()) == []


def test_a_site_that_has_no_second_answer_is_missing() -> None:
    strategy = make()
    refusal = encode_refusal(UserError("not held here"), site="north", round=1, code=NEEDS_STATE)
    strategy.collect(replies(train(strategy), east=update("east", 1), north=refusal))
    list(strategy.second_chances())
    strategy.finish_train()
    assert strategy.phase.missing == {"north": "no answer in 7 s", "south": "no answer in 7 s"}


def test_a_site_counts_once_and_its_first_answer_stands() -> None:
    strategy = make()
    messages = train(strategy)
    twice = [*replies(messages, east=update("east", 2)), *replies(messages, east=update("east", 100))]
    broken = Message(Error(2, "boom"), reply_to=messages[0])
    strategy.collect(
        iter([*twice, broken, *replies(messages, east=encode_refusal(UserError("no"), site="east", round=1))])
    )
    assert strategy.finish_train()
    assert set(np.unique(strategy.state["b"])) == {2.0}
    assert "east" not in strategy.phase.missing


def test_a_site_that_left_is_not_connected() -> None:
    strategy = make()
    del strategy.sites[3]
    strategy.collect(replies(train(strategy), east=update("east", 1), south=update("south", 1)))
    strategy.finish_train()
    assert strategy.phase.missing == {"north": "not connected"}


def test_an_answer_from_an_unknown_node_is_left_out() -> None:
    strategy = make()
    messages = train(strategy)
    del strategy.sites[4]
    strategy.collect(replies(messages, east=update("east", 1), south=update("south", 100)))
    strategy.finish_train()
    assert set(np.unique(strategy.state["b"])) == {1.0}
    assert set(strategy.phase.metrics) == {"east"}


def test_the_mean_of_huge_numbers_is_finite() -> None:
    strategy = make()
    huge = float(np.finfo(np.float32).max)
    strategy.collect(replies(train(strategy), east=update("east", huge), north=update("north", huge)))
    strategy.finish_train()
    assert np.isfinite(strategy.state["b"]).all()


# What is refused


def _add_record(content: RecordDict) -> None:
    content["debug"] = MetricRecord({"x": 1.0})


def _other_record_type(content: RecordDict) -> None:
    content["metrics"] = ConfigRecord({"records": 3})


def _metric(key: str, value: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content.metric_records["metrics"][key] = value

    return change


def _site(**values: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["site"] = ConfigRecord({**content.config_records["site"], **values})

    return change


def _fact(content: RecordDict) -> None:
    content["facts"] = ConfigRecord({"text": "a patient's letter"})


def _adapter(names: list[str], extra: dict[str, np.ndarray] | None = None) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        packed = encode_adapter(state(1).only(names), wire="fp32")
        for key, array in (extra or {}).items():
            packed.array_records["adapter"][key] = Array(array)
        content.update(packed.items())

    return change


def _undeclared_tensor(content: RecordDict) -> None:
    listed = [*table(content)["tensors"], ["letter", [1]]]
    numbers = content.array_records["adapter"]["float32"].numpy()
    content["adapter"] = ArrayRecord({"float32": Array(np.append(numbers, np.float32(1)))})
    set_table(content, tensors=listed)


def _twice(content: RecordDict) -> None:
    set_table(content, tensors=[["b", [3, 2]], ["b", [3, 2]]])


def _shape(content: RecordDict) -> None:
    set_table(content, tensors=[["b", [2, 3]], ["head", [2]]])


def _longer(content: RecordDict) -> None:
    numbers = content.array_records["adapter"]["float32"].numpy()
    content["adapter"] = ArrayRecord({"float32": Array(np.append(numbers, np.float32(1)))})


def _not_finite(content: RecordDict) -> None:
    numbers = content.array_records["adapter"]["float32"].numpy().copy()
    numbers[-1] = np.nan
    content["adapter"] = ArrayRecord({"float32": Array(numbers)})


def _no_adapter(content: RecordDict) -> None:
    del content["adapter"], content["table"]


FORGERIES: list[tuple[str, Callable[[RecordDict], None], str]] = [
    ("undeclared record", _add_record, "south: undeclared record `debug` in the message"),
    ("record of another type", _other_record_type, "south: the record `metrics` is not a MetricRecord"),
    ("undeclared metric", _metric("accuracy", 0.5), "south: undeclared metric `accuracy`"),
    ("metric of another kind of message", _metric("correct", 1), "south: undeclared metric `correct`"),
    ("list as a metric", _metric("steps", [1, 2]), "south: metric `steps` is a list"),
    ("metric that is no number", _metric("steps", float("nan")), "south: metric `steps` is nan"),
    ("no records", _metric("records", 0), "south: trained on 0 records"),
    ("a fraction of a record", _metric("records", 1e-9), "south: trained on 1e-09 records"),
    ("more records than there are", _metric("records", 1e300), "south: trained on 1e+300 records"),
    ("a note beside the name", _site(note="hello"), "south: the answer does not say which site it is"),
    ("undeclared fact", _fact, "south: undeclared fact in the answer"),
    ("another site's name", _site(name="north"), "north: answered from a node that is registered as south"),
    ("an earlier round", _site(round=6), "south: answered for round 6, this is round 7"),
    ("undeclared tensor", _undeclared_tensor, "south: unknown tensor letter"),
    ("frozen tensor", _adapter(["a", "b", "head"]), "south: tensor a is not among the declared tensors"),
    ("personal tensor", _adapter(["b", "head", "own"]), "south: tensor own is not among the declared tensors"),
    ("missing tensor", _adapter(["b"]), "south: tensor head is missing"),
    ("tensor twice", _twice, "south: tensor b is listed twice"),
    ("another shape", _shape, "south: tensor b has shape [2, 3], expected [3, 2]"),
    ("more numbers than listed", _longer, "south: the packed float32 array should be float32[8], got float32[9]"),
    (
        "another array",
        _adapter(["b", "head"], {"note": np.zeros(2, np.uint8)}),
        "south: an array of note that the table does not list",
    ),
    ("a number that is none", _not_finite, "south: tensor head holds NaN or infinity"),
    ("no adapter", _no_adapter, "south: the message holds no adapter"),
]


@pytest.mark.parametrize(("forge", "reason"), [f[1:] for f in FORGERIES], ids=[f[0] for f in FORGERIES])
def test_a_forged_answer_is_refused_named_and_left_out(forge: Callable[[RecordDict], None], reason: str) -> None:
    strategy = make()
    forged = update("south", 100, number=7)
    forge(forged)
    strategy.collect(replies(train(strategy, 7), east=update("east", 1, number=7), south=forged))
    assert strategy.finish_train()
    assert strategy.phase.missing["south"] == reason
    assert set(np.unique(strategy.state["b"])) == {1.0}
    line = strategy.record(0.0)
    assert line["sites"] == {"east": {"records": 10, "steps": 3}}
    assert set(line["missing"]) == {"north", "south"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "promise", "metrics", "reason"),
    [
        (private(), None, {}, "south: sent an update without the differential privacy that the run demands"),
        (
            private(),
            PrivacyStatement(enabled=False),
            {},
            "south: sent an update without the differential privacy that the run demands",
        ),
        (private(), PROMISE, {"loss": 0.5}, "south: sent its training loss, which no noise protects"),
        (
            private(),
            replace(PROMISE, unit="record"),
            {},
            "south: protects each record, the run demands each patient",
        ),
        (
            private(),
            replace(PROMISE, epsilon=2.001),
            {},
            "south: spent epsilon 2.001 at delta 0.0001, the run allows 2 at 0.0001",
        ),
        (
            private(),
            replace(PROMISE, delta=1e-3),
            {},
            "south: spent epsilon 1.5 at delta 0.001, the run allows 2 at 0.0001",
        ),
        (
            private(),
            replace(PROMISE, private_noise=False),
            {},
            "south: drew its noise from a seed, which the run does not allow",
        ),
    ],
)
def test_an_update_that_breaks_the_promise_is_refused(
    settings: RunConfig, promise: PrivacyStatement | None, metrics: dict[str, float], reason: str
) -> None:
    strategy = make(settings)
    good = update("east", 1, privacy=PROMISE)
    bad = update("south", 100, privacy=promise, metrics=metrics)
    strategy.collect(replies(train(strategy), east=good, south=bad))
    assert strategy.finish_train()
    assert strategy.phase.missing["south"] == reason
    assert set(np.unique(strategy.state["b"])) == {1.0}
    assert strategy.record(0.0)["sites"]["east"]["privacy"] == asdict(PROMISE)  # type: ignore[index]


def test_a_promise_met_exactly_is_kept() -> None:
    strategy = make(private())
    strategy.collect(replies(train(strategy), east=update("east", 1, privacy=replace(PROMISE, epsilon=2.0))))
    assert strategy.finish_train()


def test_seeded_noise_is_taken_where_the_run_says_so() -> None:
    strategy = make(private(seeded_noise_not_private=True))
    seeded = replace(PROMISE, private_noise=False)
    strategy.collect(replies(train(strategy), east=update("east", 1, privacy=seeded)))
    assert strategy.finish_train()


def test_a_crashed_process_is_named() -> None:
    strategy = make()
    messages = train(strategy)
    crashed = Message(Error(2, "RuntimeError"), reply_to=messages[2])
    strategy.collect([crashed, *replies(messages, east=update("east", 1))])
    strategy.finish_train()
    assert strategy.phase.missing["south"] == "its process failed: RuntimeError"
