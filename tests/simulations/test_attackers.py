"""Simulated sites that lie: what they send, that only simulations let them, and what robust rules make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.client.policy import TEMPLATE, Policy, PolicyError, unrestricted
from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.simulations.attackers import Attack, Attacker, attacking
from fedgraft.strategies import LocalRule, Training
from fedgraft.strategies.averaging import FedIT

SPEC = AdapterSpec(
    "m",
    (
        TensorSpec("x", (40, 50), dtype="float64"),
        TensorSpec("y", (7,), dtype="float64"),
        TensorSpec("own", (3,), dtype="float64", policy="local"),
    ),
)
TRAINING = Training("east", 2, 3, 0.1)


def _state(seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape) for t in SPEC.tensors})


RECEIVED, LEARNED = _state(0), _state(1)


def _sent(attack: str, seed: int = 5, training: Training = TRAINING) -> AdapterState:
    return Attacker(training, {}, None, Attack.named(attack), seed).finish(LEARNED, RECEIVED)


@pytest.mark.parametrize(
    ("attack", "factor"), [("scale:10", 10), ("scale:-2.5", -2.5), ("sign-flip", -1), ("sign-flip:4", -4)]
)
def test_a_change_is_scaled_or_turned_round(attack: str, factor: float) -> None:
    sent = _sent(attack)
    for name in ("x", "y"):
        np.testing.assert_allclose(sent[name], RECEIVED[name] + factor * (LEARNED[name] - RECEIVED[name]), rtol=1e-12)
    # What stays at the site is as it was learned: the lie is for the server.
    assert np.array_equal(sent["own"], LEARNED["own"])


def test_a_random_change_is_as_long_as_it_says_and_unlike_what_was_learned() -> None:
    for attack, times in (("random", 10.0), ("random:3", 3.0)):
        sent = _sent(attack)
        for name in ("x", "y"):
            change, honest = sent[name] - RECEIVED[name], LEARNED[name] - RECEIVED[name]
            assert np.linalg.norm(change) == pytest.approx(times * np.linalg.norm(honest), rel=1e-9)
        change, honest = (sent["x"] - RECEIVED["x"]).ravel(), (LEARNED["x"] - RECEIVED["x"]).ravel()
        # The cosine of 2000 normal numbers with anything has a standard deviation of 1 / sqrt(2000) = .022.
        assert abs(change @ honest) < 5 * 0.0224 * np.linalg.norm(change) * np.linalg.norm(honest)


def test_a_random_change_hangs_on_seed_site_and_round_alone() -> None:
    assert _sent("random") == _sent("random")
    others = (_sent("random", seed=6), _sent("random", training=Training("west", 2, 3, 0.1)))
    later = _sent("random", training=Training("east", 3, 3, 0.1))
    assert len({state.digest for state in (_sent("random"), *others, later)}) == 4


def test_an_attacker_sends_on_top_of_what_its_strategy_would() -> None:
    class Doubling(LocalRule):
        def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
            return trained + trained

    rule = Doubling(TRAINING, {"kept": RECEIVED})
    sent = Attacker(TRAINING, rule.memory, rule, Attack.named("scale:2"), 0).finish(LEARNED, RECEIVED)
    np.testing.assert_allclose(sent["x"], RECEIVED["x"] + 2 * (2 * LEARNED["x"] - RECEIVED["x"]), rtol=1e-12)


def test_only_the_sites_that_are_named_attack(tiny_federation: Any) -> None:
    config = tiny_federation.config(**{"data.sites": [{"name": "east", "attack": "sign-flip"}, "north"]})
    honest = LocalRule(TRAINING, {})
    assert attacking(honest, config, Training("north", 1, 3, 0.1)) is honest
    assert attacking(None, config, Training("north", 1, 3, 0.1)) is None
    lying = attacking(honest, config, TRAINING)
    assert isinstance(lying, Attacker) and lying.inner is honest


@pytest.mark.parametrize("text", ["scale", "scale:", "sign-flip:-2", "random:x", "steal", "scale:1e5", " scale:2"])
def test_an_attack_that_is_misspelt_is_refused_with_the_key(tiny_federation: Any, text: str) -> None:
    with pytest.raises(UserError, match=r"data\.sites\.0\.attack"):
        tiny_federation.config(**{"data.sites": [{"name": "east", "attack": text}, "north"]})


@pytest.mark.parametrize("text", ["scale:10", "scale:-0.5", "sign-flip", "sign-flip:3", "random", "random:2.5"])
def test_every_attack_that_the_configuration_takes_is_known(tiny_federation: Any, text: str) -> None:
    config = tiny_federation.config(**{"data.sites": [{"name": "east", "attack": text}, "north"]})
    assert isinstance(attacking(None, config, TRAINING), Attacker)


def test_a_site_of_its_own_refuses_a_run_with_attackers(tiny_federation: Any) -> None:
    """A deployed site has a policy; what it does not say is forbidden."""
    sites = [{"name": "east", "attack": "scale:10"}, "north"]
    config = tiny_federation.private(**{"privacy.delta": 1e-5, "evaluate.release": "noised", "data.sites": sites})
    text = TEMPLATE.replace("base_models = []", 'base_models = ["*"]')
    for policy in (Policy(text, "policy.toml"), Policy(re.sub(r"honest = true.*\n", "", text), "policy.toml")):
        with pytest.raises(PolicyError, match=r"honest = true.*site east attack \(data.sites\[\].attack\)"):
            policy.admit(config, "f" * 64, policy.datasets[0])
    unrestricted().admit(config, "f" * 64, unrestricted().datasets[0])


def test_an_attack_arrives_at_the_server_and_stands_in_the_run(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: dict[str, dict[str, Update]] = {}

    def watched(case: str) -> Callable[..., None]:
        plain = FedIT.add

        def add(self: FedIT, update: Update) -> None:
            arrived.setdefault(case, {})[update.site] = update
            plain(self, update)

        return add

    runs = {}
    for case, sites in (("clean", ["east", "north"]), ("lying", [{"name": "east", "attack": "scale:-3"}, "north"])):
        with monkeypatch.context() as patch:
            patch.setattr(FedIT, "add", watched(case))
            config = tiny_federation.config(**{"rounds": 1, "data.sites": sites})
            runs[case] = tiny_federation.run(config, tmp_path / case)
    clean, lying = arrived["clean"], arrived["lying"]
    assert clean["north"].state == lying["north"].state
    assert clean["east"].metrics["records"] == lying["east"].metrics["records"]

    b = next(name for name in clean["east"].state if "lora_B" in name)
    # B begins at zero, so the change is what was sent.
    assert np.abs(clean["east"].state[b]).max() > 0
    np.testing.assert_allclose(lying["east"].state[b], -3 * clean["east"].state[b], rtol=1e-5, atol=1e-9)
    written = json.loads((tmp_path / "lying" / "run.json").read_text())
    assert [site["attack"] for site in written["config"]["data"]["sites"]] == ["scale:-3", ""]
    # Its own log says that the lie left, through its own gate.
    log = (tmp_path / "lying" / "sites" / "east" / "audit.jsonl").read_text()
    assert '"event":"left"' in log.replace(" ", "")
