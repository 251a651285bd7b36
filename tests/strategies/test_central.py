"""Central privacy around a strategy: what one site can do to the result, what the rule inside sees, what is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.privacy import Event, Ledger, epsilon
from fedgraft.privacy.noise import RandomStream
from fedgraft.strategies import Aggregator, Capabilities, create_aggregator
from fedgraft.strategies.averaging import FedIT
from fedgraft.strategies.central import TOGETHER, CentralPrivacy

# Values in float64, so that what is measured is the mechanism and not the rounding of its result.
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("a", (2, 3), "float64", role="lora_A"),
        TensorSpec("b", (3, 2), "float64", role="lora_B"),
        TensorSpec("head", (2,), "float64", role="head"),
        TensorSpec("fixed", (2,), "float64", policy="freeze"),
        TensorSpec("own", (1,), "float64", policy="local"),
    ),
    pairs=(LowRankPair("a", "b", 2.0),),
    rank=2,
)
CLIP = 0.8


class Silence:
    """No noise, and every site is asked."""

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def uniform(self, count: int) -> np.ndarray:
        return np.zeros(count)


def silence(number: int, purpose: str) -> Silence:
    return Silence()


def names(sites: int) -> list[str]:
    return [f"site-{number:03d}" for number in range(sites)]


def config(sites: int = 5, rounds: int = 3, **central: Any) -> Any:
    values = {"enabled": True, "epsilon": 20.0, "delta": 1e-3, "clip": CLIP, **central}
    return parse_config(
        {"model": "m", "rounds": rounds, "central": values, "data": {"path": "d", "sites": names(sites)}}
    )


def random_state(draw: np.random.Generator, size: float = 1.0, spec: AdapterSpec = SPEC) -> AdapterState:
    return AdapterState(spec, {t.name: size * draw.standard_normal(t.shape) for t in spec.tensors})


def shared(state: AdapterState) -> AdapterState:
    return state.only(state.spec.select("share"))


def update(site: str, state: AdapterState, weight: float = 1.0) -> Update:
    return Update(site, shared(state), weight, {"records": weight, "loss": 0.5})


def around(rule: str | Aggregator = "fedit", ledger: Ledger | None = None, **more: Any) -> CentralPrivacy:
    inner = create_aggregator(rule) if isinstance(rule, str) else rule
    randomness = more.pop("randomness", silence)
    return CentralPrivacy(inner, config(**more), ledger or Ledger(None, unit="site"), randomness)


def after(central: CentralPrivacy, state: AdapterState, updates: list[Update]) -> AdapterState:
    central.start_round(state)
    for each in updates:
        central.add(each)
    return central.result()


def distance(one: AdapterState, other: AdapterState) -> float:
    return (one - other).norm()


def moved(state: AdapterState, draw: np.random.Generator, length: float) -> AdapterState:
    """``state`` moved by ``length`` in a random direction, over its shared tensors together."""
    step = {n: draw.standard_normal(state[n].shape) for n in state.spec.select("share")}
    norm = math.sqrt(sum(float((array**2).sum()) for array in step.values()))
    return AdapterState(state.spec, {**state, **{n: state[n] + array * length / norm for n, array in step.items()}})


# Sensitivity


@pytest.mark.parametrize("rule", ["fedit", "ffa"])
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_one_site_moves_the_result_by_at_most_the_clip_over_the_expected_sites(rule: str, rate: float) -> None:
    draw = np.random.default_rng(8)
    longest = []
    for _ in range(150):
        central = around(rule, sampling_rate=rate)
        state = central.prepare(random_state(draw))
        # Of any size, and with weights that would break an average by records.
        everybody = [
            update(site, moved(state, draw, 10.0 ** draw.uniform(-6, 9)), float(draw.integers(1, 10**9)))
            for site in names(5)
        ]
        present = [each for each in everybody if draw.random() < 0.7]
        gone = everybody[int(draw.integers(5))]
        rest = [each for each in present if each is not gone]
        one = after(central, state, sorted([*rest, gone], key=lambda each: each.site))
        other = after(around(rule, sampling_rate=rate), state, rest)
        longest.append(distance(shared(one.filled_from(state)), shared(other.filled_from(state))) * 5 * rate / CLIP)
    assert max(longest) <= 1 + 1e-6
    assert max(longest) > 1 - 1e-6, "a mechanism that does nothing would pass as well"


@pytest.mark.parametrize("rule", ["fedit", "ffa"])
def test_without_noise_and_within_the_clip_it_is_the_rule_itself_with_equal_weights(rule: str) -> None:
    draw = np.random.default_rng(9)
    central, plain = around(rule), create_aggregator(rule)
    state = central.prepare(random_state(draw))
    assert state.spec == plain.prepare(state).spec
    updates = [update(site, moved(state, draw, 0.5)) for site in names(5)]
    plain.start_round(state)
    for each in updates:
        plain.add(each)
    want = plain.result().filled_from(state)
    got = after(central, state, updates).filled_from(state)
    assert distance(got, want) < 1e-12
    # Nor do the records of a site matter.
    heavy = [Update(u.site, u.state, 10.0**number, {"records": 10.0**number}) for number, u in enumerate(updates)]
    assert distance(after(around(rule), state, heavy).filled_from(state), got) == 0


def test_the_denominator_is_fixed_and_a_missing_site_adds_zero() -> None:
    state = AdapterState(SPEC, {t.name: np.zeros(t.shape) for t in SPEC.tensors})
    head = AdapterState(SPEC, {**state, "head": np.array([0.5, 0.0])})
    for answers in range(6):
        result = after(around(), state, [update(site, head) for site in names(answers)])
        assert np.allclose(result["head"], [0.1 * answers, 0.0], rtol=1e-14)
    sampled = after(around(sampling_rate=0.5), state, [update("site-000", head)])
    assert np.allclose(sampled["head"], [0.5 / 2.5, 0.0], rtol=1e-14)


def test_tensors_are_clipped_together() -> None:
    state = AdapterState(SPEC, {t.name: np.zeros(t.shape) for t in SPEC.tensors})
    far = AdapterState(SPEC, {**state, **{name: np.full(state[name].shape, 2.0) for name in ("a", "b", "head")}})
    result = after(around(), state, [update("site-001", far)])
    # Fourteen numbers of 2 have the length sqrt(56).
    assert np.allclose(result["a"], 2 * CLIP / math.sqrt(56) / 5, rtol=1e-12)
    assert shared(result).norm() == pytest.approx(CLIP / 5, rel=1e-12)


def test_what_is_not_shared_never_enters() -> None:
    draw = np.random.default_rng(10)
    central = around()
    state = random_state(draw)
    result = after(central, state, [update(site, moved(state, draw, 0.3)) for site in names(5)])
    assert set(result) == {"a", "b", "head"}
    full = random_state(draw, 100.0)
    central.start_round(state)
    with pytest.raises(UserError, match=r"site-000: its update does not hold the shared tensors \(fixed\)"):
        central.add(Update("site-000", full, 1.0))
    assert distance(central.result(), shared(state)) == 0


def test_a_change_is_measured_from_what_that_site_was_sent() -> None:
    class Shifting(FedIT):
        def for_site(self, state: AdapterState, site: str) -> AdapterState:
            return state * 3.0 if site == "site-001" else state

    draw = np.random.default_rng(11)
    state = random_state(draw)
    result = after(around(Shifting()), state, [update("site-001", state * 3.0), update("site-002", state)])
    assert distance(result, shared(state)) < 1e-14


# What the rule inside sees


class Listening(FedIT):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Update] = []

    def add(self, update: Update) -> None:
        self.told.append(update)
        super().add(update)


def test_the_rule_inside_is_told_one_update_that_names_nobody() -> None:
    inner, draw = Listening(), np.random.default_rng(12)
    stream = RandomStream.seeded_not_private("noise")
    central = around(inner, randomness=lambda number, purpose: stream if purpose == "noise" else Silence())
    state = random_state(draw)
    updates = [update(site, moved(state, draw, 2.0), 1000.0) for site in names(5)]
    result = after(central, state, updates)
    (told,) = inner.told
    assert (told.site, told.weight, dict(told.metrics), told.privacy.enabled) == (TOGETHER, 1.0, {}, False)
    assert distance(told.state, result) == 0
    # The noise is on the update itself: no number of it is what the sites alone would have made.
    silent = after(around(), state, updates)
    assert all(np.all(told.state[name] != silent[name]) for name in told.state)


def test_a_rule_that_must_see_single_updates_is_refused_by_name() -> None:
    class Picky(FedIT):
        name = "picky"
        capabilities = Capabilities(needs_individual=True)

    with pytest.raises(UserError) as caught:
        around(Picky())
    assert str(caught.value) == (
        "strategy `picky` does more than add updates up, so central privacy cannot bound what one site does to its "
        "result; choose one whose result is a sum (fedit, ffa), or leave central.enabled off"
    )


class Momentum(FedIT):
    """A server optimiser: remembers a velocity from round to round."""

    velocity: AdapterState | None = None

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.state = state

    def result(self) -> AdapterState:
        step = super().result() - shared(self.state)
        self.velocity = step if self.velocity is None else self.velocity * 0.9 + step
        return shared(self.state) + self.velocity

    def memory(self) -> Mapping[str, AdapterState]:
        return {} if self.velocity is None else {"velocity": self.velocity}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        self.velocity = memory.get("velocity")


def test_what_the_rule_inside_remembers_goes_through_a_checkpoint(tmp_path: Path) -> None:
    def rounds(central: CentralPrivacy, state: AdapterState, numbers: list[int]) -> AdapterState:
        for number in numbers:
            draw = np.random.default_rng(number)
            updates = [update(site, moved(state, draw, 0.5 * number)) for site in names(5)]
            state = after(central, state, updates).filled_from(state)
        return state

    start = random_state(np.random.default_rng(13))
    whole = rounds(around(Momentum(), clip_quantile=0.3, rounds=4), start, [1, 2, 3, 4])
    ledger = Ledger(tmp_path / "central.jsonl", unit="site")
    before = around(Momentum(), ledger, clip_quantile=0.3, rounds=4)
    half = rounds(before, start, [1, 2])
    for name, state in before.memory().items():
        state.save(tmp_path / f"{name}.safetensors")
    resumed = around(Momentum(), Ledger(tmp_path / "central.jsonl", unit="site"), clip_quantile=0.3, rounds=4)
    kept = {name: AdapterState.load(tmp_path / f"{name}.safetensors") for name in ("velocity", "central")}
    resumed.recall(kept)
    assert resumed.clip == before.clip != CLIP
    assert distance(rounds(resumed, half, [3, 4]), whole) == 0


# Who is asked


def test_each_site_is_asked_with_the_given_chance_independently() -> None:
    stream = RandomStream.seeded_not_private("sampling")
    central = around(sites=50, rounds=400, sampling_rate=0.3, randomness=lambda number, purpose: stream)
    central.plan, taken = around(sites=50, rounds=1, sampling_rate=0.3).plan, []
    central.replan = lambda: central.plan  # type: ignore[method-assign]
    state = random_state(np.random.default_rng(14))
    for _ in range(400):
        central.start_round(state)
        asked = central.asked(names(50))
        assert list(asked) == sorted(asked)
        taken.append([site in asked for site in names(50)])
    drawn = np.array(taken, dtype=float)
    assert stats.binomtest(int(drawn.sum()), drawn.size, 0.3).pvalue > 1e-3
    # The sizes of the rounds, too, are binomial: Poisson sampling, not a fixed number.
    sizes = drawn.sum(axis=1)
    assert 0.8 < sizes.var() / (50 * 0.3 * 0.7) < 1.25
    together = np.corrcoef(drawn, rowvar=False)[np.triu_indices(50, 1)]
    assert abs(together.mean()) < 0.005 and np.abs(together).max() < 5 / math.sqrt(400)


def test_at_rate_one_everybody_is_asked_and_of_those_connected_only_the_drawn() -> None:
    central = around(randomness=lambda number, purpose: RandomStream.from_os())
    central.start_round(random_state(np.random.default_rng(15)))
    assert central.asked(names(5)) == names(5)
    assert central.asked(["site-003", "stranger"]) == ["site-003"]


def test_an_update_that_was_not_asked_for_does_not_count() -> None:
    class Half(Silence):
        def uniform(self, count: int) -> np.ndarray:
            return np.arange(count) / count  # the sites 0, 1 and 2 of 5 at rate 0.5

    central = around(sampling_rate=0.5, randomness=lambda number, purpose: Half())
    state = random_state(np.random.default_rng(16))
    far = moved(state, np.random.default_rng(17), 5.0)
    with pytest.raises(UserError, match="was not asked in this round"):
        central.add(update("site-000", far))
    central.start_round(state)
    assert central.asked(names(5)) == ["site-000", "site-001", "site-002"]
    for site in ("site-003", "stranger", TOGETHER):
        with pytest.raises(UserError, match=f"{site}: was not asked in this round"):
            central.add(update(site, far))
    assert distance(central.result(), shared(state)) == 0
    with pytest.raises(UserError, match="was not asked in this round"):
        central.add(update("site-000", far))


def test_a_site_counts_once() -> None:
    central = around()
    state = random_state(np.random.default_rng(18))
    far = moved(state, np.random.default_rng(19), 5.0)
    central.start_round(state)
    central.add(update("site-000", far))
    with pytest.raises(UserError, match="site-000: sent a second update in one round"):
        central.add(update("site-000", far))
    assert distance(central.result(), shared(state)) == pytest.approx(CLIP / 5, rel=1e-9)


def test_an_update_that_is_not_finite_or_of_another_shape_is_refused_and_adds_zero() -> None:
    central = around()
    state = random_state(np.random.default_rng(20))
    central.start_round(state)
    bad = AdapterState(SPEC, {**state, "head": np.array([np.nan, 0.0])})
    with pytest.raises(UserError, match="site-000: the change holds NaN or infinity"):
        central.add(update("site-000", bad))
    wide = AdapterSpec("lora", (TensorSpec("a", (4, 3), "float64"), *SPEC.tensors[1:]))
    with pytest.raises(UserError, match="site-001: tensor a has another shape there; central privacy needs one rank"):
        central.add(update("site-001", random_state(np.random.default_rng(21), spec=wide)))
    with pytest.raises(UserError, match="site-002: its update does not hold the shared tensors"):
        central.add(Update("site-002", state.only(["a", "head"]), 1.0))
    assert distance(central.result(), shared(state)) == 0


# What is spent


def test_a_round_is_on_the_disk_before_its_noise_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "central.jsonl"
    seen = []

    def randomness(number: int, purpose: str) -> Silence:
        seen.append((number, purpose, len(Ledger(path, unit="site").events())))
        return Silence()

    central = around(ledger=Ledger(path, unit="site"), randomness=randomness)
    state = random_state(np.random.default_rng(22))
    for _ in range(3):
        state = after(central, state, []).filled_from(state)
    assert seen == [(n, p, n - (p == "sampling")) for n in (1, 2, 3) for p in ("sampling", "noise")]
    assert epsilon(Ledger(path, unit="site").events(), 1e-3) <= 20.0
    with pytest.raises(UserError, match="no round of central privacy is open"):
        central.result()


def test_a_ledger_that_cannot_be_written_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "central.jsonl", unit="site")
    drawn = []
    central = around(ledger=ledger, randomness=lambda n, purpose: drawn.append(purpose) or Silence())

    def full(*_: object, **__: object) -> None:
        raise UserError("the ledger cannot be written")

    monkeypatch.setattr(ledger, "reserve", full)
    central.start_round(random_state(np.random.default_rng(23)))
    with pytest.raises(UserError, match="the ledger cannot be written"):
        central.result()
    assert drawn == ["sampling"]
    with pytest.raises(UserError, match="no round of central privacy is open"):
        central.result()


def test_rounds_that_were_lost_stay_spent_and_the_rest_takes_more_noise(tmp_path: Path) -> None:
    path = tmp_path / "central.jsonl"
    state = random_state(np.random.default_rng(24))
    first = around(ledger=Ledger(path, unit="site"))
    after(first, state, [])
    kept = first.memory()
    after(first, state, [])  # killed before its checkpoint
    again = around(ledger=Ledger(path, unit="site"))
    again.recall(kept)
    assert (again.completed, again.rounds_spent) == (1, 2)
    for _ in range(2):
        after(again, state, [])
    events = Ledger(path, unit="site").events()
    noises = [event.noise_multiplier for event in events]
    assert len(events) == 4
    assert noises[0] == noises[1] < noises[2] == noises[3]
    assert epsilon(events, 1e-3) <= 20.0


def test_a_round_that_cannot_be_paid_for_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "central.jsonl", unit="site")
    central = around(ledger=ledger)
    ledger.reserve(Event(0.3, 1.0, 20), round=1)
    with pytest.raises(UserError, match=r"central\.epsilon 20 .* after the 20 already spent"):
        central.start_round(random_state(np.random.default_rng(25)))
    assert central.asked(names(5)) == []


def test_a_ledger_that_lost_rounds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "central.jsonl"
    state = random_state(np.random.default_rng(26))
    central = around(ledger=Ledger(path, unit="site"))
    after(central, state, [])
    after(central, state, [])
    path.unlink()
    with pytest.raises(
        UserError, match="holds 0 rounds of central privacy, the checkpoint 2; what was spent is unknown"
    ):
        around(ledger=Ledger(path, unit="site")).recall(central.memory())


def test_a_memory_of_another_make_is_refused() -> None:
    odd = AdapterState(AdapterSpec("x", (TensorSpec("clip", (1,)),)), {"clip": np.ones(1, np.float32)})
    with pytest.raises(UserError, match="not one that this version wrote"):
        around().recall({"central": odd})


def test_the_record_says_what_was_promised_and_spent() -> None:
    central = around(clip_quantile=0.3)
    state = random_state(np.random.default_rng(27))
    after(central, state, [])
    told = central.section(14, [CLIP])
    plan = central.plan
    assert told["epsilon"] == epsilon((plan.event,), 1e-3)
    assert (told["neighbours"], told["trusted"], told["sites"], told["rounds"]) == ("add_remove site", "server", 5, 1)
    assert told["noise_per_coordinate"] == plan.sum_noise / 5
    assert told["noise_norm"] == pytest.approx(math.sqrt(14) * plan.sum_noise / 5)
    assert told["clips"] == [CLIP] and told["clip"] == central.clip != CLIP
    assert central.last_round() == {
        "clip": CLIP,
        "noise_multiplier": plan.noise_multiplier,
        "sum_noise": plan.sum_noise,
    }
