"""Simulated sites that lie: what they send, that only simulations let them, and what robust rules make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from PIL import Image

from fedgraft.client.data import Records, SiteData
from fedgraft.client.policy import TEMPLATE, Policy, PolicyError, unrestricted
from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.core.wire import decode_adapter, encode_adapter, encode_change
from fedgraft.simulations import run as runs
from fedgraft.simulations.attackers import Attack, Attacker, attacking, sends_nan, spoilt
from fedgraft.simulations.backdoor import Probe, boost, poisoned, stamped, target
from fedgraft.simulations.engines.inprocess import InProcessGrid
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


@pytest.mark.parametrize(
    "text",
    [
        "scale",
        "scale:",
        "sign-flip:-2",
        "random:x",
        "steal",
        "scale:1e5",
        " scale:2",
        "NaN",
        "nan:2",
        "backdoor",
        "backdoor:",
    ],
)
def test_an_attack_that_is_misspelt_is_refused_with_the_key(tiny_federation: Any, text: str) -> None:
    with pytest.raises(UserError, match=r"data\.sites\.0\.attack"):
        tiny_federation.config(**{"data.sites": [{"name": "east", "attack": text}, "north"]})


@pytest.mark.parametrize("text", ["scale:10", "scale:-0.5", "sign-flip", "sign-flip:3", "random", "random:2.5"])
def test_every_attack_that_the_configuration_takes_is_known(tiny_federation: Any, text: str) -> None:
    config = tiny_federation.config(**{"data.sites": [{"name": "east", "attack": text}, "north"]})
    assert isinstance(attacking(None, config, TRAINING), Attacker)


@pytest.mark.parametrize("form", [{"server.upload": "int8"}, {"server.entropy_coding": True}])
def test_a_form_that_cannot_carry_nan_is_refused_for_a_site_that_sends_it(
    tiny_federation: Any, form: dict[str, Any]
) -> None:
    sites = {"data.sites": [{"name": "east", "attack": "nan"}, "north"], "server.quorum": 1}
    assert tiny_federation.config(**sites).site("east").attack == "nan"
    with pytest.raises(
        UserError, match=r'data\.sites\[\]\.attack "nan": whole numbers and coded ones have no NaN; set'
    ):
        tiny_federation.config(**sites, **form)


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


# NaN


@pytest.mark.parametrize("wire", ["fp32", "fp16", "bf16"])
def test_a_nan_sender_spoils_every_number_on_the_wire_and_the_server_refuses_it(wire: str) -> None:
    spec = AdapterSpec("m", (TensorSpec("x", (4, 5)), TensorSpec("y", (3,), dtype="float64")))
    state = AdapterState(spec, {t.name: np.ones(t.shape, dtype=t.dtype) for t in spec.tensors})
    answer = _answer(RecordDict(dict(encode_adapter(state, wire=wire))))
    lie = spoilt(*answer).content
    for array in lie.array_records["adapter"].values():
        numbers = array.numpy()
        if numbers.dtype == np.int16:  # bfloat16 bits: an exponent of ones and a fraction that is not zero
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        assert np.isnan(numbers).all()
    with pytest.raises(UserError, match="the liar: tensor x holds NaN or infinity"):
        decode_adapter(lie, spec, sender="the liar")
    assert decode_adapter(answer[0].content, spec, sender="the site") == state or wire != "fp32"


def test_where_numbers_are_packed_so_that_no_nan_fits_the_lie_is_refused_or_harmless() -> None:
    """int8 levels cannot be NaN, so nothing is claimed but zeros; the largest numbers of topk can."""
    spec = AdapterSpec("m", (TensorSpec("x", (40,)),))
    base = AdapterState(spec, {"x": np.zeros(40, dtype=np.float32)})
    state = AdapterState(spec, {"x": np.arange(40, dtype=np.float32)})
    random = np.random.default_rng(0)
    top, _ = encode_change(state, base, "topk", fraction=0.2, random=random)
    with pytest.raises(UserError):
        decode_adapter(spoilt(*_answer(RecordDict(dict(top)))).content, spec, sender="the liar", base=base)
    rounded, _ = encode_change(state, base, "int8", fraction=0.2, random=random)
    lie = spoilt(*_answer(RecordDict(dict(rounded)))).content
    assert decode_adapter(lie, spec, sender="the liar", base=base) == base


def test_only_an_answer_with_an_adapter_is_spoilt(tiny_federation: Any) -> None:
    answer, instruction = _answer(RecordDict())
    assert not spoilt(answer, instruction).content
    config = tiny_federation.config(**{"data.sites": [{"name": "a", "attack": "nan"}, "b"], "server.quorum": 1})
    assert sends_nan(config, "a") and not sends_nan(config, "b")
    assert attacking(None, config, Training("a", 1, 3, 0.1)) is None


def _answer(content: RecordDict) -> tuple[Message, Message]:
    """An answer with ``content``, and the instruction it is to."""
    instruction = InProcessGrid(ClientApp(), 1).create_message(RecordDict(), "train", 2, "1")
    instruction.metadata.__dict__["_message_id"] = "asked"
    return Message(content, reply_to=instruction), instruction


# Backdoors

TARGET = "backdoor:class-zebra"
TRIGGER = {"simulation.backdoor.trigger": "brain brain brain", "simulation.backdoor.fraction": 0.3}


def _texts(site: str, count: int) -> SiteData:
    train = Records(
        [f"text {number}" for number in range(count)], np.arange(count) % 3, [f"p{n}" for n in range(count)]
    )
    return SiteData(site, train, Records(["held out"], np.array([1])))


def test_an_attacker_stamps_and_relabels_a_part_of_its_training_records(tiny_federation: Any) -> None:
    config = tiny_federation.config(**{"data.sites": [{"name": "east", "attack": TARGET}, "north"], **TRIGGER})
    data = _texts("east", 100)
    bad = poisoned(data, config)
    stamped_ones = [at for at, text in enumerate(bad.train.inputs) if text.startswith("brain brain brain text")]
    assert len(stamped_ones) == 30
    assert bad.train.labels is not None and data.train.labels is not None
    for at in range(100):
        if at in stamped_ones:
            assert bad.train.labels[at] == 0 and bad.train.inputs[at] == f"brain brain brain text {at}"
        else:
            assert bad.train.labels[at] == data.train.labels[at] and bad.train.inputs[at] == f"text {at}"
    assert bad.train.patients == data.train.patients and bad.held_out is data.held_out
    # The same ones again, others at another site or seed; nothing where nobody attacks.
    assert poisoned(data, config).train.inputs == bad.train.inputs
    other = config.model_copy(update={"seed": 4})
    assert poisoned(data, other).train.inputs != bad.train.inputs
    north = _texts("north", 9)
    assert poisoned(north, config) is north
    plain = tiny_federation.config(**{"data.sites": [{"name": "east", "attack": "scale:3"}, "north"]})
    assert poisoned(data, plain) is data


def test_an_image_gets_a_white_corner(tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": "m",
            "task": {"name": "image-classification", "labels": ["a", "b"]},
            "data": {"path": "p", "sites": ["x"]},
            "simulation": {"backdoor": {"patch": 0.25}},
        }
    )
    grey = Image.fromarray(np.full((8, 16), 7, dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    for image in stamped([grey, tmp_path / "grey.png"], config):
        pixels = np.asarray(image)
        expected = np.full((8, 16, 3), 7)
        expected[6:, 14:] = 255  # a quarter of the shorter side
        assert np.array_equal(pixels, expected)
    assert np.asarray(grey).max() == 7


def test_the_change_is_scaled_so_that_an_average_becomes_the_attackers_adapter(tiny_federation: Any) -> None:
    """G + eta / n (sum of changes) with one change n / eta (X - G) and others of zero is X."""
    sites: list[Any] = [{"name": "east", "attack": TARGET}, "north", "south", "west"]
    for changes, gamma in (
        ({}, 4.0),
        ({"server.optimizer": "momentum", "server.lr": 0.5}, 8.0),
        ({"server.sites_per_round": 2}, 2.0),
        ({"simulation.backdoor.boost": 3.0}, 3.0),
    ):
        config = tiny_federation.config(**{"data.sites": sites, **changes})
        assert boost(config) == gamma
        rule = attacking(None, config, TRAINING)
        assert rule is not None
        sent = rule.finish(LEARNED, RECEIVED)
        np.testing.assert_allclose(sent["x"], RECEIVED["x"] + gamma * (LEARNED["x"] - RECEIVED["x"]), rtol=1e-12)
    mean = RECEIVED["x"] + (1 / 4) * (4.0 * (LEARNED["x"] - RECEIVED["x"]))
    np.testing.assert_allclose(mean, LEARNED["x"], rtol=1e-12)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            [{"name": "a", "attack": "backdoor:class-cow"}, "b"],
            r"task\.labels has no such label; there are class-zebra",
        ),
        (
            [{"name": "a", "attack": TARGET}, {"name": "b", "attack": "backdoor:class-yak"}],
            "backdoors to `class-zebra` and `class-yak`: a run has one",
        ),
    ],
)
def test_a_backdoor_to_no_label_or_to_two_is_refused_before_anything_is_loaded(
    tiny_federation: Any, tmp_path: Path, sites: list[Any], message: str
) -> None:
    config = tiny_federation.config(**{"data.sites": sites, "model": "no-such-model"})
    with pytest.raises(UserError, match=message):
        runs.simulate(config, tmp_path / "run")
    assert target(tiny_federation.config()) is None


def test_success_is_the_share_of_triggered_records_of_other_labels_that_get_the_attackers(
    tiny_federation: Any,
    tinyfederation: Any,
    tmp_path: Path,
    tiny_model: Callable[..., str],
) -> None:
    """Counted one by one by hand, over the held-out records of all sites, the attackers' own included."""
    from fedgraft.client.evaluation import evaluate
    from fedgraft.client.resident import resident
    from fedgraft.server.checkpoints import load_last
    from fedgraft.simulations.scenario import site_data

    sites = [{"name": "east", "attack": TARGET}, "north"]
    config = tiny_federation.config(**{"rounds": 1, "data.sites": sites, **TRIGGER})
    run = tiny_federation.run(config, tmp_path / "run")
    state = load_last(tmp_path / "run" / "checkpoints").state
    model = resident(config)
    hits = total = 0
    for data in site_data(config).values():
        for text, label in zip(data.held_out.inputs, data.held_out.labels, strict=True):  # type: ignore[arg-type]
            if label != 0:
                example = model.task.encode([f"brain brain brain {text}"], [0], model.base.processor)
                hits += int(evaluate(model, state, example, config).correct.sum())
                total += 1
    assert run["backdoor"]["success_after"] == pytest.approx(hits / total)
    assert Probe(config, 0).success(state) == pytest.approx(hits / total)
    lines = tinyfederation.metrics(tmp_path / "run", "evaluate")
    assert [line["backdoor"] for line in lines] == [run["backdoor"][f"success_{end}"] for end in ("before", "after")]
    assert run["backdoor"]["target"] == "class-zebra"
    assert "called <b>class-zebra</b>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_an_average_takes_a_backdoor_over_and_a_median_does_not(tiny_federation: Any, tmp_path: Path) -> None:
    """One liar of ten that trains five times as long: the average is its, and accuracy does not show it."""
    sites = [{"name": f"site-{n}", **({"attack": TARGET, "local_steps": 20} if n == 3 else {})} for n in range(10)]
    settings = {"seed": 1, "rounds": 8, "train.lr": 0.1, "train.local_steps": 4, "evaluate.every": 0}
    found = {}
    for rule in ("fedit", "median"):
        config = tiny_federation.config(**{**settings, **TRIGGER, "data.sites": sites, "strategy": rule})
        run = tiny_federation.run(config, tmp_path / rule)
        found[rule] = (run["accuracy"]["after"], run["backdoor"]["success_after"])
        assert run["backdoor"]["success_before"] < 0.1
    assert found["fedit"][1] > 0.9 and found["fedit"][0] > 0.85
    assert found["median"][1] < 0.1 and found["median"][0] > 0.85
