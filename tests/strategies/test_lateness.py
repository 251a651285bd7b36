"""Late results: what they add against a naive twin, that each counts once, and where they are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import encode_adapter, encode_answer, encode_refusal, no_answer
from fedgraft.strategies import create_aggregator, strategies
from fedgraft.strategies.compose import compose
from fedgraft.strategies.flower import PeftStrategy
from fedgraft.strategies.lateness import late_refusal, require_same_tensors, staleness_weight

SITES = {2: "east", 3: "north", 4: "south", 5: "west"}
RECORDS = {"east": 10, "north": 31, "south": 7, "west": 20}
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 3), role="lora_A", policy="freeze"),
        TensorSpec("b", (3, 2), role="lora_B"),
        TensorSpec("head", (2,), role="head"),
        TensorSpec("own", (1,), policy="local"),
    ),
)
SHARED = ("b", "head")
Tensors = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def drawn(seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape).astype(np.float32) for t in SPEC.tensors})


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m",
        "privacy": {"enabled": False},
        "data": {"path": "d.csv", "sites": list(SITES.values())},
        "server": {"quorum": 1, "round_timeout": 7, "late": "staleness", **changes.pop("server", {})},
    }
    return parse_config({**values, **changes})


class Play:
    """Rounds of a strategy whose sites send what is drawn for them; and the naive twin, in float64."""

    def __init__(self, settings: RunConfig | None = None) -> None:
        self.settings = settings or config()
        self.strategy = PeftStrategy(compose(self.settings), drawn(0), self.settings, run="r", fingerprint="f" * 64)
        self.strategy.sites = dict(SITES)
        self.asked: dict[tuple[int, str], Message] = {}
        self.globals: dict[int, Tensors] = {}

    def sent(self, site: str, number: int) -> AdapterState:
        return drawn(100 * number + list(RECORDS).index(site) + 1).only(SHARED)

    def reply(self, site: str, number: int, content: RecordDict | None = None) -> Message:
        packed = encode_adapter(self.sent(site, number), wire="fp32")
        metrics = {"records": RECORDS[site], "steps": 3}
        if content is None:
            content = encode_answer("train", site=site, round=number, metrics=metrics, adapter=packed)
        return Message(content, reply_to=self.asked[number, site])

    def begin(self, number: int) -> None:
        messages = self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
        self.asked |= {(number, SITES[message.metadata.dst_node_id]): message for message in messages}
        self.globals[number] = {name: self.strategy.state[name].astype(np.float64) for name in SHARED}

    def round(self, number: int, *arrived: tuple[str, int]) -> dict[str, Any]:
        """Round ``number`` in which the results (site, round) arrive; its line."""
        self.begin(number)
        self.strategy.collect([self.reply(*each) for each in arrived])
        assert self.strategy.finish_train()
        return self.strategy.record(1.0)

    def twin(self, number: int, arrived: Iterable[tuple[str, int]], exponent: float) -> Tensors:
        """The weighted mean of fresh results and of late ones that are moved to where the round began."""
        total = {name: np.zeros_like(self.globals[number][name]) for name in SHARED}
        weights = 0.0
        for site, begun in arrived:
            weight = RECORDS[site] / (1 + number - begun) ** exponent
            weights += weight
            for name in SHARED:
                theta = self.sent(site, begun)[name].astype(np.float64)
                total[name] += weight * (self.globals[number][name] + theta - self.globals[begun][name])
        return {name: array / weights for name, array in total.items()}

    def require(self, want: Tensors) -> None:
        """Within a few roundings to float32, of a rebased result and of the mean."""
        for name in SHARED:
            np.testing.assert_allclose(self.strategy.state[name], want[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("exponent", [0.5, 0.0, 2.0])
def test_late_results_count_as_their_change_and_less_by_their_age(exponent: float) -> None:
    play = Play(config(server={"staleness_exponent": exponent}))
    arrivals = {
        1: [("east", 1)],
        # One round late beside the same site's fresh result, and one of a site that is late again.
        2: [("east", 2), ("north", 1), ("north", 2), ("south", 1)],
        # Two rounds late and one round late.
        3: [("north", 3), ("west", 1), ("south", 2), ("west", 2), ("west", 3)],
        4: [("west", 4)],
    }
    for number, arrived in arrivals.items():
        line = play.round(number, *arrived)
        play.require(play.twin(number, arrived, exponent))
        late = [each for each in arrived if each[1] < number]
        told = [(entry["site"], entry["round"], entry["age"], entry["why"]) for entry in line.get("late", ())]
        assert told == [(site, begun, number - begun, "") for site, begun in sorted(late)]
        assert set(line["sites"]) == {site for site, begun in arrived if begun == number}
        assert set(line["faults"]) == set(RECORDS) - set(line["sites"]), "who missed the deadline is told of"


def test_with_nobody_late_the_bits_are_those_of_the_rule_that_drops() -> None:
    digests = set()
    for late in ("drop", "staleness"):
        play = Play(config(server={"late": late}))
        for number in (1, 2):
            play.round(number, *((site, number) for site in ("east", "west")))
        digests.add(play.strategy.state.digest)
    assert len(digests) == 1


def test_the_weight_is_the_published_polynomial() -> None:
    assert [staleness_weight(age, 0.5) for age in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-15)
    assert staleness_weight(4, 0) == 1 and staleness_weight(4, 2) == pytest.approx(1 / 25, rel=1e-15)


def test_late_results_make_no_quorum() -> None:
    play = Play(config(server={"quorum": 2}))
    play.round(1, ("east", 1), ("north", 1))
    before = play.strategy.state.digest
    play.begin(2)
    play.strategy.collect([play.reply("east", 2), play.reply("south", 1), play.reply("west", 1)])
    assert not play.strategy.finish_train() and play.strategy.state.digest == before


def test_a_late_result_counts_once_however_often_it_comes() -> None:
    play = Play()
    play.round(1, ("east", 1))
    arrived = [("east", 2), ("south", 1)]
    line = play.round(2, *arrived, ("south", 1))
    play.require(play.twin(2, arrived, 0.5))
    assert len(line["late"]) == 1
    # Nor a round later, nor one that came in time.
    line = play.round(3, ("east", 3), ("south", 1), ("east", 1))
    play.require(play.twin(3, [("east", 3)], 0.5))
    assert "late" not in line and line["faults"] == dict.fromkeys(("north", "south", "west"), "late")


def test_one_that_is_older_than_allowed_is_named_when_it_can_count_no_more_and_then_ignored() -> None:
    play = Play(config(server={"max_staleness": 1}))
    for number in (1, 2, 3):
        fresh = [("east", number), ("north", number), ("west", number)]
        line = play.round(number, *fresh, *([("south", 1)] if number == 3 else ()))
        play.require(play.twin(number, fresh, 0.5))
    why = "it has not come in time (server.max_staleness = 1)"
    assert line["late"] == [{"site": "south", "round": 1, "age": 2, "why": why}]


def test_only_what_may_still_come_is_kept() -> None:
    play = Play(config(server={"max_staleness": 2}))
    for number in range(1, 7):
        play.round(number, ("east", number))
    kept = play.strategy._awaited._given
    assert {number for number, _ in kept} == {4, 5, 6} and len({id(given) for _, given in kept.values()}) == 3


def test_a_site_that_is_gone_since_is_heard_all_the_same() -> None:
    play = Play()
    play.round(1, ("east", 1))
    del play.strategy.sites[4]
    arrived = [("east", 2), ("south", 1)]
    line = play.round(2, *arrived)
    play.require(play.twin(2, arrived, 0.5))
    assert line["faults"]["south"] == "absent" and line["late"][0]["site"] == "south"


def _bad(play: Play, kind: str) -> Message:
    if kind == "refusal":
        return play.reply("south", 1, encode_refusal(UserError("the disk is full"), site="south", round=1))
    if kind == "other site":
        return play.reply("south", 1, play.reply("east", 1).content)
    if kind == "no records":
        packed = encode_adapter(play.sent("south", 1), wire="fp32")
        content = encode_answer("train", site="south", round=1, metrics={"records": 0, "steps": 3}, adapter=packed)
        return play.reply("south", 1, content)
    packed = encode_adapter(play.sent("south", 1).only(["b"]), wire="fp32")
    content = encode_answer("train", site="south", round=1, metrics={"records": 7, "steps": 3}, adapter=packed)
    return play.reply("south", 1, content)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("refusal", "the disk is full"),
        ("other site", "east: answered"),
        ("no records", "0 records"),
        ("fewer tensors", "head"),
    ],
)
def test_a_late_result_is_checked_as_a_fresh_one_and_named(kind: str, why: str) -> None:
    play = Play()
    play.round(1, ("east", 1))
    play.begin(2)
    play.strategy.collect([play.reply("east", 2), _bad(play, kind), play.reply("south", 2)])
    assert play.strategy.finish_train()
    play.require(play.twin(2, [("east", 2), ("south", 2)], 0.5))
    line = play.strategy.record(1.0)
    assert why in line["late"][0]["why"], line["late"]  # type: ignore[index]
    assert set(line["sites"]) == {"east", "south"}, "what is wrong with an old result says nothing of the new one"


def test_a_late_result_keeps_the_promise_of_the_run_and_its_privacy_is_told() -> None:
    promise = PrivacyStatement(enabled=True, unit="patient", epsilon=1.5, delta=1e-4, steps=9)
    lacking = PrivacyStatement(enabled=False)
    asked = {"enabled": True, "unit": "patient", "epsilon": 2.0, "delta": 1e-4}
    play = Play(config(privacy=asked))

    def reply(site: str, number: int, statement: PrivacyStatement) -> Message:
        packed = encode_adapter(play.sent(site, number), wire="fp32")
        metrics = {"records": RECORDS[site], "steps": 3}
        content = encode_answer("train", site=site, round=number, metrics=metrics, adapter=packed, privacy=statement)
        return Message(content, reply_to=play.asked[number, site])

    play.begin(1)
    play.strategy.collect([reply("east", 1, promise)])
    assert play.strategy.finish_train()
    play.begin(2)
    play.strategy.collect([reply("east", 2, promise), reply("north", 1, promise), reply("south", 1, lacking)])
    assert play.strategy.finish_train()
    play.require(play.twin(2, [("east", 2), ("north", 1)], 0.5))
    north, south = play.strategy.record(1.0)["late"]  # type: ignore[misc]
    assert north["privacy"]["epsilon"] == 1.5 and north["why"] == ""
    assert "without the differential privacy" in south["why"] and "privacy" not in south


def test_flower_keeps_an_instruction_for_as_long_as_its_answer_may_count() -> None:
    for late, ttl in (("staleness", 7 * (1 + 2 * 2)), ("drop", 7)):
        play = Play(config(server={"late": late}))
        play.begin(1)
        assert {message.metadata.ttl for message in play.asked.values()} == {ttl}
        arrays, settings = ArrayRecord(), ConfigRecord()
        messages = play.strategy.configure_evaluate(1, arrays, settings, None)  # type: ignore[arg-type]
        assert {message.metadata.ttl for message in messages} == {7}


def test_only_a_result_that_is_late_is_awaited_not_one_that_was_refused_or_lost() -> None:
    play = Play()
    play.begin(1)
    asked = play.asked
    lost = no_answer(asked[1, "north"], "absent", "the connection to it was lost")
    dead = Message(Error(2, "killed"), reply_to=asked[1, "south"])
    play.strategy.collect([play.reply("east", 1), lost, dead])
    assert play.strategy.finish_train()
    line = play.round(2, ("east", 2), ("north", 1), ("south", 1), ("west", 1))
    assert [entry["site"] for entry in line["late"]] == ["west"]
    play.require(play.twin(2, [("east", 2), ("west", 1)], 0.5))


# What cannot go together


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"central": {"enabled": True}}, "central.enabled"),
        ({"secure_sum": {"enabled": True, "threshold": 3}, "server": {"quorum": 3}}, "secure_sum.enabled"),
        ({"tensor_policy": {"*b": "odd"}}, "tensor_policy"),
        ({"tensor_policy": {"*b": "even"}}, "tensor_policy"),
        *(
            ({"strategy": name}, f"strategy `{name}`")
            for name in (
                "fedbuff",
                "flexlora",
                "fedex",
                "frlora",
                "fedsvd",
                "deer",
                "fedask",
                "geometric-median",
                "norm-bound",
            )
        ),
        ({"strategy": "flwr:FedAvg"}, "strategy `flwr:FedAvg`"),
        ({"strategy": "ravan", "strategy_options": {"heads": 1}}, "strategy `ravan`"),
    ],
)
def test_what_a_late_result_would_make_wrong_is_refused(changes: dict[str, Any], key: str) -> None:
    server = changes.get("server", {})
    compose(config(**{**changes, "server": {**server, "late": "drop"}}))
    with pytest.raises(UserError) as caught:
        compose(config(**changes))
    told = str(caught.value)
    assert 'server.late "staleness"' in told and key in told and told.endswith('set server.late = "drop"')


def test_a_quorum_of_all_sites_leaves_nobody_to_wait_for() -> None:
    for quorum in (0, 4):
        with pytest.raises(UserError, match=r"server\.late.*server\.quorum"):
            config(server={"quorum": quorum})
    assert config(server={"quorum": 3}).server.most_late == 2
    assert config(server={"late": "drop", "quorum": 0}).server.most_late == 0


@pytest.mark.parametrize("name", ["rolora", "lora-a2", "scaffold"])
def test_a_strategy_whose_rounds_differ_in_what_they_send_is_refused(name: str, toy: Any) -> None:
    rule = create_aggregator(name)
    state = rule.prepare(toy(create_aggregator("fedit")).draw(0))
    rule.ranks = dict.fromkeys(SITES.values(), 4)
    require_same_tensors(rule, state, config(strategy=name, server={"late": "drop"}))
    with pytest.raises(UserError, match=rf"server\.late.*strategy `{name}`"):
        require_same_tensors(rule, state, config(strategy=name))
    assert rule.round == 0


def test_every_strategy_is_refused_or_adds_changes_up() -> None:
    """A new one that declares a sum falls under this list, and is to be thought about."""
    built_in = {name: cls for name, cls in strategies().items() if cls.__module__.startswith("fedgraft.")}
    fit = {name for name, cls in built_in.items() if not late_refusal(config(strategy=name), cls.capabilities)}
    assert fit == {
        *("fedit", "fedprox", "ffa", "fedsa", "fedper", "fedrep", "fedbn", "ditto", "fedrot", "la-lora"),
        *("fed-sb", "ravan"),
        # Refused when their tensors are known.
        *("rolora", "lora-a2", "scaffold"),
    }
