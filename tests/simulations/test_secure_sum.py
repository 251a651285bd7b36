"""Whole runs under a secure sum: the plain run's adapter, whoever is lost when, and nothing single at the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.progress import SILENT, Watch
from fedgraft.core.wire import STEPS, encode_refusal, encode_secure, no_answer
from fedgraft.privacy.securesum.messages import Survivors
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate

ON = {"secure_sum.enabled": True}
FIVE = {"data.sites": ["east", "north", "south", "up", "west"], "server.quorum": 3, "secure_sum.threshold": 3}


def state(folder: Path) -> AdapterState:
    """The global adapter after the last round."""
    return AdapterState.load(sorted(folder.glob("checkpoints/round-*/adapter.safetensors"))[-1])


def apart(one: Path, other: Path) -> float:
    a, b = state(one), state(other)
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


def kind_of(message: Message) -> str:
    return message.metadata.message_type.removeprefix("query.")


@pytest.fixture
def run(tinyfederation: Any) -> Any:
    """``run(config, output, between)``: one site after another, so that each message passes ``between``."""

    def one(config: Any, output: Path, between: Any = None, watch: Watch = SILENT) -> dict[str, Any]:
        with tinyfederation.intercepted(between, config):
            return simulate(config, output, execution=Execution(cohort=1), watch=watch)

    return one


def losing(*lost: tuple[str, str], fault: Any = "late"):
    """Between server and sites: who is lost from which kind of exchange on."""
    kinds = ("keys", "shares", "train", "agree", "reveal")

    def between(site: str, message: Message, answer: Any) -> Message:
        for name, when in lost:
            kind = kind_of(message)
            if name == site and kind in kinds and kinds.index(kind) >= kinds.index(when):
                if kind == when:
                    answer()  # it was at work, and its answer is lost
                return no_answer(message, fault, "lost by the test")
        return answer()

    return between


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, 0.0),
        ({"secure_sum.bits": 32, "secure_sum.most_records": 256}, 0.0),
        ({"strategy": "rolora"}, 0.0),
        ({"server.optimizer": "momentum", "server.lr": 0.5}, 0.0),
        # Their server goes on from the mean by a singular value decomposition, or keeps controls.
        ({"strategy": "fedsvd"}, 1e-5),
        ({"strategy": "scaffold", "train.momentum": 0.0}, 1e-6),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_round_gives_the_plain_runs_adapter_within_the_stated_error(run, tiny_federation, tmp_path, changes, more):
    plain = {key: value for key, value in changes.items() if not key.startswith("secure_sum")}
    run(tiny_federation.config(rounds=1, **plain), tmp_path / "plain")
    told = run(tiny_federation.config(rounds=1, **changes, **ON), tmp_path / "secure")["secure_sum"]
    largest = max(float(np.abs(array).max()) for array in state(tmp_path / "plain").values())
    assert 0 < told["error"] < 1e-6
    # Beside it both runs round to float32, the secure one a change and not the number itself.
    assert apart(tmp_path / "plain", tmp_path / "secure") <= told["error"] + 2**-22 * largest + more


def test_three_rounds_under_differential_privacy_are_those_of_the_plain_run(run, tiny_federation, tmp_path):
    seeded = {"privacy.seeded_noise_not_private": True}
    plain = run(tiny_federation.private(**seeded), tmp_path / "plain")
    secure = run(tiny_federation.private(**seeded, **ON), tmp_path / "secure")
    assert apart(tmp_path / "plain", tmp_path / "secure") < 1e-5
    for site in plain["sites"]:
        a, b = (dict(each["sites"][site]["privacy"]) for each in (plain, secure))
        assert a.pop("ledger") != b.pop("ledger")
        assert a == b
    for line in (tmp_path / "secure" / "sites" / "east" / "ledgers").glob("*.jsonl"):
        outcomes = [json.loads(text).get("outcome") for text in line.read_text().splitlines()]
        assert outcomes.count("released") == 3


def test_the_server_is_sent_no_update_no_weight_and_no_loss_of_a_site(run, tiny_federation, tmp_path, tinyfederation):
    answers: list[tuple[str, str, RecordDict]] = []

    def between(site: str, message: Message, answer: Any) -> Message:
        reply = answer()
        answers.append((site, kind_of(message), reply.content))
        return reply

    told = run(tiny_federation.config(rounds=2, **ON), tmp_path / "run", between)
    allowed = {"train": {"site", "metrics", "masked"}, "hello": {"site", "facts"}, "evaluate": {"site", "metrics"}}
    allowed |= {key: {"site", "secure"} for key in STEPS}
    assert {kind for _, kind, _ in answers} == set(allowed)
    for _, kind, content in answers:
        assert set(content) == allowed[kind]
        if kind == "train":
            assert dict(content["metrics"]) == {"steps": 3}
    for site in told["sites"].values():
        assert site["records"] is site["units"] is site["held_out"] is None
    (weight,) = {line["secure_sum"]["weight"] for line in tinyfederation.metrics(tmp_path / "run", "train")}
    plain = run(tiny_federation.config(rounds=0), tmp_path / "plain")
    assert weight == sum(site["records"] for site in plain["sites"].values())
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What the server saw" in page and "The secure sum was simulated" in page
    assert "Each site sent its adapter as trained" not in page


@pytest.mark.parametrize(
    ("when", "fault"),
    [("keys", "late"), ("shares", "crashed"), ("train", "late"), ("agree", "crashed"), ("reveal", "late")],
)
def test_two_of_five_sites_are_lost_between_the_exchanges(run, tiny_federation, tmp_path, tinyfederation, when, fault):
    config = tiny_federation.config(rounds=1, **FIVE, **ON)
    told = run(config, tmp_path / "run", losing(("north", when), ("west", when), fault=fault))
    (line,) = tinyfederation.metrics(tmp_path / "run", "train")
    early = when in ("keys", "shares", "train")
    assert told["status"] == "finished"
    assert set(line["missing"]) == ({"north", "west"} if early else set())
    assert set(line["faults"].values()) == ({fault} if early else set())
    assert set(line["secure_sum"]["unheard"]) == (set() if early else {"north", "west"})
    assert line["secure_sum"]["sites"] == (3 if early else 5)
    # The plain run that misses the same sites comes to the same.
    plain = {key: value for key, value in FIVE.items() if not key.startswith("secure_sum")}
    gone = losing(("north", "train"), ("west", "train")) if early else None
    run(tiny_federation.config(rounds=1, **plain), tmp_path / "plain", gone)
    assert apart(tmp_path / "plain", tmp_path / "run") < 1e-6


@pytest.mark.parametrize("when", ["shares", "train", "reveal"])
def test_below_the_threshold_a_run_ends_in_one_line_and_goes_on_when_the_sites_are_back(
    run, tiny_federation, tmp_path, when
):
    config = tiny_federation.config(rounds=2, **FIVE, **ON)
    lost = losing(("north", when), ("west", when), ("up", when))
    with pytest.raises(UserError, match=r"^round 1: 2 of 5 sites .* which needs 3 .*nothing was unmasked.*--resume"):
        run(config, tmp_path / "run", lost)
    resumed = tiny_federation.resume(config, tmp_path / "run")
    assert (resumed["status"], resumed["rounds"]) == ("finished", 2)
    whole = run(config, tmp_path / "whole")
    assert resumed["digest"] == whole["digest"]


def test_sites_that_a_scenario_sends_away_or_has_crash_are_done_without(run, tiny_federation, tmp_path, tinyfederation):
    sites = [{"name": name} for name in ("east", "north", "south", "up", "west")]
    sites[1]["crashes"] = [1]
    sites[4]["straggler"] = True
    config = tiny_federation.config(rounds=2, **{**FIVE, "data.sites": sites}, **ON)
    run(config, tmp_path / "run")
    first, second = tinyfederation.metrics(tmp_path / "run", "train")
    assert first["faults"] == {"north": "crashed", "west": "late"} and second["faults"] == {"west": "late"}
    assert (first["secure_sum"]["sites"], second["secure_sum"]["sites"]) == (3, 4)


def test_a_site_that_starts_again_is_sent_the_whole_adapter_and_masks_once(run, tiny_federation, tmp_path):
    asked = []

    def between(site: str, message: Message, answer: Any) -> Message:
        if site == "north" and kind_of(message) == "train":
            asked.append(len(message.content["adapter"]))
            if len(asked) == 1:
                return Message(
                    encode_refusal(UserError("gone"), site=site, round=1, code="needs-state"), reply_to=message
                )
        return answer()

    run(tiny_federation.config(rounds=1), tmp_path / "plain")
    run(tiny_federation.config(rounds=1, **ON), tmp_path / "run", between)
    assert len(asked) == 2
    assert apart(tmp_path / "plain", tmp_path / "run") < 1e-6


def test_an_update_in_the_open_is_not_taken(run, tiny_federation, tmp_path, tinyfederation):
    plain = tiny_federation.config(rounds=1)
    open_answers: dict[str, RecordDict] = {}

    def keep(site: str, message: Message, answer: Any) -> Message:
        reply = answer()
        if kind_of(message) == "train":
            open_answers[site] = reply.content
        return reply

    run(plain, tmp_path / "plain", keep)

    def between(site: str, message: Message, answer: Any) -> Message:
        if site == "north" and kind_of(message) == "train":
            return Message(open_answers["north"], reply_to=message)
        return answer()

    config = tiny_federation.config(rounds=1, **{**FIVE, "data.sites": ["east", "north", "south", "up"]}, **ON)
    run(config, tmp_path / "run", between)
    (line,) = tinyfederation.metrics(tmp_path / "run", "train")
    assert line["missing"] == {"north": "north: told its loss, which a secure sum keeps at the site"}


def test_a_server_that_shows_two_sets_of_survivors_gets_nothing(run, tiny_federation, tmp_path):
    def between(site: str, message: Message, answer: Any) -> Message:
        if kind_of(message) == "agree" and site in ("up", "west"):
            said = Survivors.decode(message.content["secure"]["message"], "the server").sites
            message.content["secure"] = encode_secure(Survivors(tuple(s for s in said if s != "east")).encode())[
                "secure"
            ]
        return answer()

    config = tiny_federation.config(rounds=1, **FIVE, **ON)
    why = r"^round 1: 0 of 5 sites revealed their shares .*east: up has not signed the round as site east knows it"
    with pytest.raises(UserError, match=why):
        run(config, tmp_path / "run", between)


# What cannot be


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": "geometric-median"}, "looks at single updates.*choose one that adds up"),
        ({"strategy": "flora"}, "choose one that adds up|does more with the updates"),
        ({"strategy": "fedask"}, "asks each site twice"),
        ({"data.sites": ["east", "north"]}, "needs 3 sites or more, here are 2: two reveal each other"),
        ({"secure_sum.threshold": 2}, "secure_sum.threshold is 2; for 3 sites it lies within 3 and 3"),
        ({"server.quorum": 2}, "a secure sum needs 3 of the 3 sites"),
        ({"server.sites_per_round": 2}, "a secure sum needs 3 of the 3 sites"),
        ({"central.enabled": True, "central.delta": 0.01}, "switch central.enabled or secure_sum.enabled off"),
        ({"server.upload": "int8"}, "secure_sum.bits = 32 sends the bytes of fp32"),
        ({"server.wire_dtype": "fp16"}, "set server.upload"),
        ({"secure_sum.bits": 32, "secure_sum.most_records": 2**31}, "set secure_sum.bits = 64"),
        (
            {"data.sites": [{"name": "a", "attack": "nan"}, "b", "c", "d"], "server.quorum": 3},
            "sends its update in the open",
        ),
    ],
)
def test_what_a_secure_sum_cannot_be_with_is_refused_beforehand(run, tiny_federation, tmp_path, changes, why):
    with pytest.raises(UserError, match=why):
        run(tiny_federation.config(**{**ON, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_too_large_is_told_by_the_site_with_the_key_to_raise(run, tiny_federation, tmp_path):
    config = tiny_federation.config(rounds=1, **{"secure_sum.most_records": 10}, **ON)
    with pytest.raises(UserError, match=r"the secure sum takes 1 to 10; raise secure_sum.most_records"):
        run(config, tmp_path / "run")


def test_numbers_that_are_clipped_are_told_of_at_the_site(run, tiny_federation, tinyfederation, tmp_path):
    notes = tinyfederation.Notes()
    config = tiny_federation.config(rounds=1, **{"secure_sum.range": 1e-4}, **ON)
    run(config, tmp_path / "run", watch=notes)
    assert any("changed by more than secure_sum.range 0.0001" in text for text in notes.texts)


def test_baselines_run_without_it(run, tiny_federation, tmp_path):
    config = tiny_federation.config(rounds=1, **{"simulation.baseline": "central"}, **ON)
    assert run(config, tmp_path / "run")["secure_sum"] is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["workers", "flower"])
def test_every_engine_comes_to_the_same_adapter(run, tiny_federation, tmp_path, engine):
    config = tiny_federation.config(rounds=2, **ON)
    run(config, tmp_path / "here")
    chosen = Execution(engine=engine, workers=2) if engine == "workers" else Execution(engine=engine)
    told = simulate(config, tmp_path / "there", execution=chosen)
    assert told["engine"] == engine and told["secure_sum"]["error"] > 0
    assert apart(tmp_path / "here", tmp_path / "there") < 1e-6
