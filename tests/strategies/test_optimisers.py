"""Server optimisers against a loop number by number, and against Flower's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.core.update import Update
from fedgraft.server.checkpoints import Checkpoint, load_last, save
from fedgraft.strategies.aggregator import Aggregator, Capabilities
from fedgraft.strategies.averaging import FedIT
from fedgraft.strategies.optimisers import Kind, ServerOptimiser, why_not

SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 3), "float64", role="lora_A", averaging="product"),
        TensorSpec("b", (3, 2), "float64", role="lora_B", averaging="product"),
        TensorSpec("head", (2,), "float32", role="head"),
        TensorSpec("own", (2,), policy="local"),
        TensorSpec("fixed", (2,), policy="freeze"),
    ),
    pairs=(LowRankPair("a", "b", 2.0),),
    rank=2,
    alpha=4.0,
)
SHARED = SPEC.select("share")
KINDS: tuple[Kind, ...] = ("avg", "momentum", "adam", "yogi", "adagrad")
MOVING = KINDS[1:]
SETTINGS: dict[str, float] = {"lr": 0.3, "momentum": 0.8, "beta2": 0.95, "tau": 0.01}


def state(seed: int, spec: AdapterSpec = SPEC, scale: float = 1.0) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: (scale * random.standard_normal(t.shape)).astype(t.dtype) for t in spec.tensors})


def updates(seed: int, spec: AdapterSpec = SPEC) -> list[Update]:
    shared = spec.select("share")
    return [Update(f"site-{k}", state(10 * seed + k, spec).only(shared), float(k + 1)) for k in range(3)]


def one_round(rule: Aggregator, start: AdapterState, arrived: Sequence[Update]) -> AdapterState:
    rule.start_round(start)
    for update in arrived:
        rule.add(update)
    return rule.result().filled_from(start).with_spec(start.spec)


def mean(arrived: Sequence[Update]) -> dict[str, np.ndarray]:
    total = sum(update.weight for update in arrived)
    return {
        name: sum(u.weight * u.state[name].astype(np.float64) for u in arrived) / total for name in arrived[0].state
    }


def published(
    kind: str,
    x: float,
    deltas: Sequence[float],
    lr: float,
    momentum: float,
    beta2: float,
    tau: float,
) -> float:
    """Algorithm 2 of Reddi et al., and FedAvgM, for one number over the rounds' changes ``deltas``."""
    m, v = 0.0, tau**2
    for delta in deltas:
        if kind == "avg":
            x += lr * delta
            continue
        if kind == "momentum":
            m = momentum * m + delta
            x += lr * m
            continue
        m = delta if kind == "adagrad" else momentum * m + (1 - momentum) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * math.copysign(1.0, v - delta**2)
        x += lr * m / (math.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_are_the_published_loop_number_by_number(kind: Kind) -> None:
    rule, now = ServerOptimiser(FedIT(), kind, **SETTINGS), state(0)
    first = now
    deltas: dict[str, list[np.ndarray]] = {name: [] for name in SHARED}
    for seed in (1, 2, 3):
        arrived = updates(seed)
        for name, array in mean(arrived).items():
            # The mean comes back in the tensors' own precision, of which the step is made.
            deltas[name].append(array.astype(now[name].dtype).astype(np.float64) - now[name].astype(np.float64))
        now = one_round(rule, now, arrived)
    for name in SHARED:
        for at in np.ndindex(first[name].shape):
            want = published(kind, float(first[name][at]), [float(d[at]) for d in deltas[name]], **SETTINGS)
            # float64: a dozen roundings of numbers near 1; float32: one a round.
            tolerance = 1e-13 if SPEC.by_name[name].dtype == "float64" else 1e-6
            assert now[name][at] == pytest.approx(want, rel=tolerance, abs=tolerance)


def test_the_mean_at_learning_rate_one_is_the_rule_itself_to_the_bit() -> None:
    inner, rule = FedIT(), ServerOptimiser(FedIT(), "avg", 1.0)
    assert one_round(rule, state(0), updates(1)) == one_round(inner, state(0), updates(1))
    assert rule.capabilities == inner.capabilities
    assert not rule.memory()


@pytest.mark.parametrize("lr", [0.25, 2.0])
def test_the_mean_at_another_learning_rate_goes_a_part_of_the_way(lr: float) -> None:
    start, arrived = state(0), updates(1)
    got, whole = one_round(ServerOptimiser(FedIT(), "avg", lr), start, arrived), mean(arrived)
    for name in SHARED:
        want = start[name] + lr * (whole[name] - start[name])
        np.testing.assert_allclose(got[name], want, rtol=1e-6 if got[name].dtype == np.float32 else 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_where_no_site_moved(kind: Kind) -> None:
    start = state(0)
    rule = ServerOptimiser(FedIT(), kind, **SETTINGS)
    for _ in range(2):
        still = [Update("east", start.only(SHARED), 3.0), Update("north", start.only(SHARED), 1.0)]
        got = one_round(rule, start, still)
        for name in SHARED:
            np.testing.assert_allclose(got[name], start[name], rtol=1e-12)


@pytest.mark.parametrize("kind", MOVING)
def test_frozen_and_personal_tensors_are_left_alone(kind: Kind) -> None:
    class Whole(FedIT):
        """Gives a whole state in which the personal tensors are other numbers."""

        def start_round(self, state: AdapterState) -> None:
            super().start_round(state)
            self.whole = state

        def result(self) -> AdapterState:
            given = super().result().filled_from(self.whole)
            return AdapterState(given.spec, {**given, "own": given["own"] + 1, "fixed": given["fixed"] + 1})

    start = state(0)
    plain = one_round(ServerOptimiser(FedIT(), kind, **SETTINGS), start, updates(1))
    whole = one_round(ServerOptimiser(Whole(), kind, **SETTINGS), start, updates(1))
    assert all(np.array_equal(plain[name], start[name]) for name in ("own", "fixed"))
    assert all(np.array_equal(whole[name], start[name] + 1) for name in ("own", "fixed")), "as the rule gave them"
    assert all(np.array_equal(plain[name], whole[name]) for name in SHARED)


@pytest.mark.parametrize("kind", MOVING)
def test_a_tensor_that_a_round_does_not_share_keeps_its_value_and_its_moments(kind: Kind) -> None:
    resting = SPEC.with_policy("freeze", lambda tensor: tensor.name == "a")
    rule, gapless = (ServerOptimiser(FedIT(), kind, **SETTINGS) for _ in range(2))
    now = one_round(rule, state(0), updates(1))
    rested = one_round(rule, now, updates(2, resting))
    assert np.array_equal(rested["a"], now["a"])
    after = one_round(rule, rested, updates(3))
    one_round(gapless, state(0), updates(1))
    assert np.array_equal(after["a"], one_round(gapless, now, updates(3))["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(kind: Kind, tmp_path: Path) -> None:
    """Through real checkpoint files, so that float64 moments survive as they are."""
    whole, broken = (ServerOptimiser(FedIT(), kind, **SETTINGS) for _ in range(2))
    reached = state(0)
    for seed in (1, 2):
        reached = one_round(whole, reached, updates(seed))
    now = one_round(broken, state(0), updates(1))
    save(tmp_path, Checkpoint(1, now, broken.memory()), "digest", keep=1)
    held = load_last(tmp_path)
    again = ServerOptimiser(FedIT(), kind, **SETTINGS)
    again.recall(held.memory)
    got = one_round(again, held.state, updates(2))
    assert got == reached
    assert {k: m.digest for k, m in again.memory().items()} == {k: m.digest for k, m in whole.memory().items()}


def test_moments_are_held_in_float64_whatever_the_tensors_are() -> None:
    rule = ServerOptimiser(FedIT(), "adam", **SETTINGS)
    one_round(rule, state(0), updates(1))
    memory = rule.memory()
    assert set(memory) == {"optimiser-m", "optimiser-v"}
    assert all(tuple(kept) == SHARED and kept["head"].dtype == np.float64 for kept in memory.values())


def test_a_foreign_memory_is_refused() -> None:
    rule = ServerOptimiser(FedIT(), "adam")
    with pytest.raises(UserError, match=r"memory of server\.optimizer is not one"):
        rule.recall({"optimiser-m": state(0)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_makes_new_factors_keeps_no_moments_over_them(kind: Kind) -> None:
    class Refactoring(FedIT):
        name = "flexlora"
        capabilities = Capabilities(resets_state=True)

    class Basing(FedIT):
        name = "fedex"
        capabilities = Capabilities(touches_base=True)

    for rule in (Refactoring, Basing):
        if kind == "avg":
            assert one_round(ServerOptimiser(rule(), kind, 1.0), state(0), updates(1)) is not None
        with pytest.raises(UserError, match=rf'strategy `{rule.name}` cannot have server\.optimizer "{kind}"'):
            ServerOptimiser(rule(), kind, 0.5)


def test_the_reason_is_told_to_whoever_asks_before() -> None:
    assert why_not("avg", Capabilities(resets_state=True)) is None
    assert "new factors" in (why_not("adam", Capabilities(resets_state=True)) or "")
    assert "base weights" in (why_not("avg", Capabilities(touches_base=True), lr=0.5) or "")
    assert "losses" in (why_not("momentum", Capabilities(needs_loss=True)) or "")
    assert why_not("yogi", Capabilities(linear_sum=True, exact=True)) is None


def test_a_step_is_not_exact_even_around_an_exact_rule() -> None:
    class Exact(FedIT):
        capabilities = Capabilities(linear_sum=True, exact=True)

    assert ServerOptimiser(Exact(), "avg", 1.0).capabilities.exact
    stepping = ServerOptimiser(Exact(), "avg", 0.5).capabilities
    assert not stepping.exact and stepping.linear_sum
    assert Exact.capabilities.exact, "the class keeps its own"


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(UserError, match=r"server\.optimizer `lion` is none of avg, momentum, adam, yogi, adagrad"):
        ServerOptimiser(FedIT(), "lion")


def test_a_step_that_overflows_is_refused_by_tensor() -> None:
    with pytest.raises(NonFiniteError, match="tensor head"):
        one_round(ServerOptimiser(FedIT(), "avg", 1e300), state(0), updates(1))


# Flower's own, on the same messages


@pytest.fixture
def _identity() -> None:
    # Flower sets it in the processes that it starts; a message outside of them has no sender without it.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


PLAIN = AdapterSpec("lora", SPEC.tensors[:2])


def reply(update: Update) -> Message:
    arrays = ArrayRecord({name: Array(np.asarray(array)) for name, array in update.state.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": update.weight})})
    asked = Message(RecordDict(), dst_node_id=1, message_type="train", group_id="1", ttl=60)
    return Message(content, reply_to=asked)


def flower(kind: str, server_round: int) -> Any:
    lr, momentum, beta2, tau = (SETTINGS[key] for key in ("lr", "momentum", "beta2", "tau"))
    if kind == "momentum":
        return FedAvgM(server_learning_rate=lr, server_momentum=momentum)
    if kind == "adagrad":
        return FedAdagrad(eta=lr, tau=tau)
    make = FedAdam if kind == "adam" else FedYogi
    return make(eta=lr, beta_1=momentum, beta_2=beta2, tau=tau)


@pytest.mark.usefixtures("_identity")
@pytest.mark.parametrize("kind", MOVING)
def test_flowers_own_gives_the_same_numbers_but_for_its_beginning_and_its_bias_correction(kind: Kind) -> None:
    theirs, ours = flower(kind, 1), ServerOptimiser(FedIT(), kind, **SETTINGS)
    now = state(0, PLAIN)
    if kind == "momentum":
        theirs.current_arrays = ArrayRecord({n: Array(np.asarray(a)) for n, a in now.items()})
    else:
        theirs.v_t = {n: np.full(a.shape, SETTINGS["tau"] ** 2) for n, a in now.items()}
    for number in (1, 2, 3):
        arrived = updates(number, PLAIN)
        if kind != "momentum":
            theirs.current_arrays = {n: np.asarray(a) for n, a in now.items()}
        if kind == "adam":
            # Undo the correction, which Algorithm 2 does not have.
            ahead = number + 1.0
            correction = math.sqrt(1 - SETTINGS["beta2"] ** ahead) / (1 - SETTINGS["momentum"] ** ahead)
            theirs.eta = SETTINGS["lr"] / correction
        want, _ = theirs.aggregate_train(number, [reply(update) for update in arrived])
        now = one_round(ours, now, arrived)
        for name, array in want.items():
            np.testing.assert_allclose(now[name], array.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_identity")
def test_flowers_adam_as_it_is_begins_elsewhere() -> None:
    """Why it is not simply used: the first step of the two differs by far more than rounding."""
    theirs, now, arrived = flower("adam", 1), state(0, PLAIN), updates(1, PLAIN)
    theirs.current_arrays = {n: np.asarray(a) for n, a in now.items()}
    want, _ = theirs.aggregate_train(1, [reply(update) for update in arrived])
    got = one_round(ServerOptimiser(FedIT(), "adam", **SETTINGS), now, arrived)
    apart = max(float(np.abs(want[name].numpy() - got[name]).max()) for name in PLAIN.names)
    assert apart > 0.1 * SETTINGS["lr"]


@pytest.mark.slow
def test_a_whole_run_keeps_its_moments_over_a_stop(tiny_federation: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"server.optimizer": "adam", "server.lr": 0.05}
    whole = tiny_federation.run(tiny_federation.config(**settings), tmp_path / "whole")
    tiny_federation.run(tiny_federation.config(rounds=2, **settings), tmp_path / "parts")
    parts = tiny_federation.resume(tiny_federation.config(**settings), tmp_path / "parts", rounds=3)
    assert parts["digest"] == whole["digest"]
