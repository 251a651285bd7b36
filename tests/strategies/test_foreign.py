"""Flower's strategies as they are: the same result as by their formulas, and a clear refusal of what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator, strategies
from fedgraft.strategies.contract import StrategyContract
from fedgraft.strategies.foreign import Foreign, foreign

SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 5), role="lora_A"),
        TensorSpec("b", (4, 2), role="lora_B"),
        TensorSpec("head", (3,), role="head"),
        TensorSpec("fixed", (2,), policy="freeze"),
        TensorSpec("own", (1,), policy="local"),
    ),
    pairs=(LowRankPair("a", "b", 2.0),),
    rank=2,
)
SHARED = SPEC.select("share")
SITES = ("east", "north", "south", "west")

OWN = '''
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy

class Last(FedAvg):
    """The last answer wins."""
    def __init__(self, bonus: float = 0.0):
        super().__init__()
        self.bonus = bonus
    def aggregate_train(self, server_round, replies):
        last = list(replies)[-1].content["arrays"]
        return ArrayRecord({name: Array(array.numpy() + self.bonus) for name, array in last.items()}), None

class Picky(FedAvg):
    """Asks one node a round, in turn."""
    def configure_train(self, server_round, arrays, config, grid):
        nodes = sorted(grid.get_node_ids())
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return [m for m in messages if m.metadata.dst_node_id == nodes[server_round % len(nodes)]]

class Listing(FedAvg):
    """Keeps a list of its rounds, which changes in place."""
    def __init__(self):
        super().__init__()
        self.rounds = []
    def aggregate_train(self, server_round, replies):
        self.rounds.append(server_round)
        return super().aggregate_train(server_round, replies)

class Doubling(FedAvg):
    """Sends twice the adapter."""
    def configure_train(self, server_round, arrays, config, grid):
        twice = ArrayRecord({name: Array(array.numpy() * 2) for name, array in arrays.items()})
        return super().configure_train(server_round, twice, config, grid)

class Sending(FedAvg):
    """Sends messages of its own."""
    def configure_train(self, server_round, arrays, config, grid):
        return grid.send_and_receive([])

class Crashing(FedAvg):
    """Fails."""
    def aggregate_train(self, server_round, replies):
        return 1 / 0

class Waiting(FedAvg):
    """Waits for nodes without end."""
    def configure_train(self, server_round, arrays, config, grid):
        while len(list(grid.get_node_ids())) < 100:
            pass

class Wrong(FedAvg):
    """Returns something else."""
    def aggregate_train(self, server_round, replies):
        return ArrayRecord({"other": Array(list(replies)[0].content["arrays"]["a"].numpy())}), None

class Free(FedAvg):
    """Any option."""
    def __init__(self, **more):
        super().__init__()
        self.more = more["anything"]

class Needy(FedAvg):
    """Wants an object."""
    def __init__(self, helper: Strategy):
        super().__init__()
'''


def state(seed: int) -> AdapterState:
    draw = np.random.default_rng(seed)
    return AdapterState(SPEC, {t.name: draw.standard_normal(t.shape).astype(np.float32) for t in SPEC.tensors})


def updates(round: int = 0) -> list[Update]:
    return [
        Update(
            site, state(10 * round + k + 1).only(SHARED), 10.0 * (k + 1), {"records": 10.0 * (k + 1), "loss": 0.5 + k}
        )
        for k, site in enumerate(SITES)
    ]


def after(rule: Aggregator, start: AdapterState, given: list[Update], number: int = 1) -> AdapterState:
    rule.round = number
    rule.start_round(start)
    asked = rule.asked(SITES)
    for update in given:
        if update.site in asked:
            rule.add(update)
    return rule.result()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name under which a strategy of the user's own module is chosen."""
    (tmp_path / "users_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "users_strategies", raising=False)
    foreign.cache_clear()
    return lambda name: f"flwr:users_strategies:{name}"


# What comes out


def test_flowers_average_is_fedit() -> None:
    start, given = state(0), updates()
    got, want = after(create_aggregator("flwr:FedAvg"), start, given), after(create_aggregator("fedit"), start, given)
    assert tuple(got) == SHARED
    for name in SHARED:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_flowers_adam_is_its_formula_over_three_rounds() -> None:
    """Reddi et al. 2020, algorithm 2, with Flower's correction of the rate: of the round's number plus one."""
    eta, beta, gamma, tau = 0.05, 0.8, 0.9, 0.01
    rule = create_aggregator("flwr:FedAdam", {"eta": eta, "beta_1": beta, "beta_2": gamma, "tau": tau})
    current = state(0)
    x = {name: current[name].astype(np.float64) for name in SHARED}
    m = {name: np.zeros(x[name].shape) for name in SHARED}
    v = {name: np.zeros(x[name].shape) for name in SHARED}
    for number in (1, 2, 3):
        given = updates(number)
        total = sum(update.weight for update in given)
        rate = eta * np.sqrt(1 - gamma ** (number + 1)) / (1 - beta ** (number + 1))
        for name in SHARED:
            delta = sum(u.weight * u.state[name].astype(np.float64) for u in given) / total - x[name]
            m[name] = beta * m[name] + (1 - beta) * delta
            v[name] = gamma * v[name] + (1 - gamma) * delta**2
            x[name] = x[name] + rate * m[name] / (np.sqrt(v[name]) + tau)
        current = after(rule, current, given, number).filled_from(current)
        for name in SHARED:
            np.testing.assert_allclose(current[name], x[name], rtol=1e-4, atol=1e-5)


def test_flowers_median_and_krum_are_theirs() -> None:
    given = updates()
    got = after(create_aggregator("flwr:FedMedian"), state(0), given)
    for name in SHARED:
        np.testing.assert_allclose(got[name], np.median([u.state[name] for u in given], axis=0), rtol=1e-6)
    far = [*given[:3], Update("west", given[3].state * 1000.0, 1e6)]
    chosen = after(create_aggregator("flwr:Krum", {"num_malicious_nodes": 1}), state(0), far)
    assert any(all(np.array_equal(chosen[name], u.state[name]) for name in SHARED) for u in far[:3])


def test_the_loss_reaches_a_strategy_that_asks_for_it() -> None:
    """q-FedAvg, Li et al. 2020: a step along the sum of F_k^q L (x - y_k) over the sum of their h_k."""
    q, rate = 0.5, 0.1
    start, given = state(0), updates()
    rule = create_aggregator("flwr:QFedAvg", {"q": q, "client_learning_rate": rate})
    steps, curvature = {name: np.zeros(start[name].shape) for name in SHARED}, 0.0
    for update in given:
        loss = update.metrics["loss"] + 1e-10
        gradient = {name: (start[name].astype(np.float64) - update.state[name]) / rate for name in SHARED}
        for name in SHARED:
            steps[name] += loss**q * gradient[name]
        curvature += q * loss ** (q - 1) * sum((g**2).sum() for g in gradient.values()) + loss**q / rate
    got = after(rule, start, given)
    for name in SHARED:
        np.testing.assert_allclose(got[name], start[name] - steps[name] / curvature, rtol=1e-4, atol=1e-5)
    silent = [Update(u.site, u.state, u.weight, {"records": u.weight}) for u in given]
    with pytest.raises(UserError, match=r"strategy `flwr:QFedAvg` failed: AggregationError: .*train_loss"):
        after(create_aggregator("flwr:QFedAvg", {"client_learning_rate": rate}), start, silent)


def test_a_users_own_strategy_is_used_with_its_options(own: Callable[[str], str]) -> None:
    given = updates()
    got = after(create_aggregator(own("Last"), {"bonus": 0.5}), state(0), given)
    for name in SHARED:
        np.testing.assert_array_equal(got[name], given[-1].state[name] + np.float32(0.5))
    assert create_aggregator(own("Free"), {"anything": 3}).options.anything == 3


def test_a_strategy_picks_the_sites_of_a_round(own: Callable[[str], str]) -> None:
    rule = create_aggregator(own("Picky"))
    asked = []
    for number in (1, 2, 3, 4):
        rule.round = number
        rule.start_round(state(0))
        asked += rule.asked(SITES)
    assert asked == ["north", "south", "west", "east"]
    half = create_aggregator("flwr:FedAvg", {"fraction_train": 0.5})
    half.round = 1
    half.start_round(state(0))
    assert len(half.asked(SITES)) == 2


class TestFlowersAverage(StrategyContract):
    strategy = "flwr:FedAvg"
    options = {"min_train_nodes": 1, "min_available_nodes": 1}  # noqa: RUF012

    @property
    def cls(self) -> type[Aggregator]:
        return foreign("flwr:FedAvg")


def test_foreign_strategies_are_not_among_the_own() -> None:
    create_aggregator("flwr:FedAvg")
    assert not any(name.startswith("flwr") for name in strategies())
    cls = foreign("flwr:FedAdam")
    assert issubclass(cls, Foreign) and cls.name == "flwr:FedAdam" and "FedAdam" in cls.summary
    assert cls.capabilities.needs_individual and not cls.capabilities.linear_sum
    assert cls.Options.model_fields["eta"].default == 0.1
    assert "train_metrics_aggr_fn" not in cls.Options.model_fields


# What is refused


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "flwr:FedAvgg",
            {},
            r"^unknown strategy `flwr:FedAvgg`; Flower has Bulyan, .*your own is flwr:package.module:C",
        ),
        ("flwr:Strategy", {}, "is no strategy of flwr.serverapp.strategy"),
        ("flwr:Result", {}, "is no strategy of"),
        ("flwr:nowhere:Thing", {}, "strategy `flwr:nowhere:Thing` cannot be loaded: ModuleNotFoundError"),
        ("flwr:json:loads", {}, "is no strategy of"),
        ("flwr:json:nothing", {}, "cannot be loaded: AttributeError"),
        ("flwr:FedAdam", {"etta": 1}, "strategy_options.etta: .* has no such option; did you mean `eta`"),
        ("flwr:FedAdam", {"eta": "much"}, "strategy_options.eta: .*number"),
        ("flwr:QFedAvg", {}, "strategy_options.client_learning_rate: Field required"),
        ("flwr:FedTrimmedAvg", {"beta": 0.7}, r"cannot be made: ValueError: `beta` must be"),
        (
            "flwr:DifferentialPrivacyServerSideFixedClipping",
            {},
            "needs a `strategy`, which no configuration can hold",
        ),
    ],
)
def test_a_name_or_option_that_is_wrong_is_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        create_aggregator(name, options)


def test_an_object_as_an_option_is_refused(own: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="needs a `helper`, which no configuration can hold"):
        create_aggregator(own("Needy"))
    with pytest.raises(UserError, match="cannot be made: KeyError: 'anything'"):
        create_aggregator(own("Free"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Doubling", "sends the sites other arrays than the global adapter's"),
        ("Sending", "sends messages of its own"),
        ("Waiting", "waits for more than the 4 sites of the run"),
        ("Crashing", "`flwr:users_strategies:Crashing` failed: ZeroDivisionError: division by zero"),
        ("Wrong", "returned no adapter: unknown tensor other"),
    ],
)
def test_a_strategy_that_does_more_than_aggregate_is_refused(own: Callable[[str], str], name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        after(create_aggregator(own(name)), state(0), updates())


def test_a_strategy_whose_sites_must_do_something_is_refused() -> None:
    rule = create_aggregator("flwr:FedProx", {"proximal_mu": 0.1})
    with pytest.raises(UserError, match="tells the sites a `proximal-mu`, which a fedgraft site does not heed"):
        after(rule, state(0), updates())


def test_too_few_sites_are_refused_at_once() -> None:
    rule = create_aggregator("flwr:FedAvg", {"min_available_nodes": 9})
    rule.start_round(state(0))
    with pytest.raises(UserError, match=r"waits for 9 sites, the run has 4; set strategy_options.min_available_nodes"):
        rule.asked(SITES)
    with pytest.raises(UserError, match="made nothing of 4 updates: it needs more sites"):
        after(create_aggregator("flwr:Bulyan", {"num_malicious_nodes": 1}), state(0), updates())


# Resuming


def test_a_strategy_without_a_state_goes_on_and_another_is_refused(own: Callable[[str], str]) -> None:
    for name in ("flwr:FedAvg", "flwr:Krum", "flwr:FedMedian", own("Last")):
        rule = create_aggregator(name)
        after(rule, state(0), updates())
        assert rule.memory() == {}, name
        create_aggregator(name).recall({})
    for name in ("flwr:FedAdam", "flwr:FedAvgM", own("Listing")):
        rule = create_aggregator(name)
        assert rule.memory() == {}, "nothing has happened yet"
        after(rule, state(0), updates())
        with pytest.raises(UserError, match="keeps a state of its own, which no checkpoint holds"):
            create_aggregator(name).recall(rule.memory())


def test_a_run_with_flowers_average_is_a_run_with_fedit(tiny_federation: Any, tmp_path: Path) -> None:
    plain = tiny_federation.run(tiny_federation.config(rounds=2), tmp_path / "fedit")
    flower = tiny_federation.run(tiny_federation.config(rounds=2, strategy="flwr:FedAvg"), tmp_path / "flwr")
    assert flower["strategy"]["name"] == "flwr:FedAvg" and flower["status"] == "finished"
    assert flower["accuracy"]["after"] == pytest.approx(plain["accuracy"]["after"], abs=0.02)
    assert flower["loss"]["after"] == pytest.approx(plain["loss"]["after"], rel=1e-3)


def test_a_run_whose_strategy_lost_its_state_is_not_resumed(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(rounds=1, strategy="flwr:FedAdam", strategy_options={"eta": 0.01})
    tiny_federation.run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"strategy `flwr:FedAdam` keeps a state of its own"):
        tiny_federation.resume(config, tmp_path / "run", rounds=2)
