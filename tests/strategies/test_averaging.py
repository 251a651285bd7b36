"""The mean of updates against a naive float64 mean; what cannot be averaged is refused by name."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.core.update import Update
from fedgraft.strategies.averaging import FedIT, RunningMean

PAIR = LowRankPair("a", "b", scaling=2.0)
SPEC = AdapterSpec(
    method="lora",
    rank=3,
    alpha=6.0,
    tensors=(
        TensorSpec("a", (3, 5), role="lora_A", averaging="product"),
        TensorSpec("b", (4, 3), role="lora_B", averaging="product"),
        TensorSpec("head", (2, 4), dtype="float64", role="head"),
        TensorSpec("scalar", ()),
    ),
    pairs=(PAIR,),
)
WEIGHTS = (3.0, 1.0, 2500.0, 0.125)


def _state(seed: int, spec: AdapterSpec = SPEC, scale: float = 1.0) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: (scale * random.standard_normal(t.shape)).astype(t.dtype) for t in spec.tensors})


STATES = tuple(_state(seed, scale=10.0**seed) for seed in range(4))


def _naive(states: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """sum w_k theta_k / sum w_k, number by number, with exact sums."""
    total = math.fsum(weights)
    mean = {}
    for name in states[0]:
        flat = [state[name].astype(np.float64).ravel() for state in states]
        at = [math.fsum(w * f[i] for w, f in zip(weights, flat, strict=True)) / total for i in range(flat[0].size)]
        mean[name] = np.array(at).reshape(states[0][name].shape)
    return mean


def _mean(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    mean = RunningMean()
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


def _fedit(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    rule = FedIT()
    rule.start_round(states[0])
    for index, (state, weight) in enumerate(zip(states, weights, strict=True)):
        rule.add(Update(site=f"site-{index}", state=state, weight=weight))
    return rule.result()


RULES = pytest.mark.parametrize("rule", [_mean, _fedit])


@RULES
def test_it_is_the_naive_mean(rule: type) -> None:
    got, want = rule(STATES, WEIGHTS), _naive(STATES, WEIGHTS)
    assert tuple(got) == SPEC.names and got.spec == SPEC
    for name, array in got.items():
        assert array.dtype.name == SPEC.by_name[name].dtype
        # float32: one rounding of the result. float64: a few of the sum.
        bound = 2.0**-24 if array.dtype == np.float32 else 1e-15
        assert np.abs(array - want[name]).max() <= bound * np.abs(want[name]).max(), name


def test_small_sites_beside_large_ones_are_not_rounded_away() -> None:
    """In float32 a weight of one in ten million would vanish from the sum."""
    spec = AdapterSpec(method="m", tensors=(TensorSpec("x", (1,)),))
    big, small = (AdapterState(spec, {"x": np.array([v], np.float32)}) for v in (0.0, 1.0))
    states, weights = [big, *[small] * 1000], [1e10, *[1.0] * 1000]
    assert _mean(states, weights)["x"][0] == pytest.approx(1000 / (1e10 + 1000), rel=1e-6)
    ones = [small] * 3
    assert _mean(ones, [2.0**24, 1.0, 1.0])["x"][0] == 1.0


@RULES
def test_one_site_is_the_identity(rule: type) -> None:
    for weight in (1.0, 3.0, 0.1, 12345.678):
        got = rule([STATES[0]], [weight])
        for name in got:
            # Exactly for float32; a float64 may lose its last bit to w x / w.
            tolerance = 0 if got[name].dtype == np.float32 else 3e-16
            np.testing.assert_allclose(got[name], STATES[0][name], rtol=tolerance, atol=0)


@RULES
def test_the_order_of_the_sites_does_not_matter(rule: type) -> None:
    want = rule(STATES, WEIGHTS)
    for order in itertools.permutations(range(4)):
        got = rule([STATES[i] for i in order], [WEIGHTS[i] for i in order])
        for name in got:
            # In exact arithmetic equal; the float64 sums differ in their last bits.
            np.testing.assert_allclose(got[name], want[name], rtol=2.0**-22 if got[name].dtype == np.float32 else 1e-12)


@RULES
def test_only_the_proportion_of_the_weights_matters(rule: type) -> None:
    for factor in (1e-6, 7.0, 1e9):
        got, want = rule(STATES, [factor * w for w in WEIGHTS]), rule(STATES, WEIGHTS)
        for name in got:
            np.testing.assert_allclose(got[name], want[name], rtol=2.0**-22 if got[name].dtype == np.float32 else 1e-12)


@RULES
def test_a_weight_of_two_is_two_sites_of_one(rule: type) -> None:
    twice, once = rule(STATES[:2], [2.0, 1.0]), rule([STATES[0], STATES[0], STATES[1]], [1.0, 1.0, 1.0])
    for name in twice:
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-6)


@RULES
def test_a_mean_of_means_is_the_mean(rule: type) -> None:
    """Linear in the updates: sites behind a proxy count as they would alone."""
    halves = [rule(STATES[:2], WEIGHTS[:2]), rule(STATES[2:], WEIGHTS[2:])]
    got, want = rule(halves, [sum(WEIGHTS[:2]), sum(WEIGHTS[2:])]), rule(STATES, WEIGHTS)
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@RULES
def test_only_what_was_shared_is_averaged(rule: type) -> None:
    shared = [state.only(["b", "head"]) for state in STATES]
    got, want = rule(shared, WEIGHTS), rule(STATES, WEIGHTS)
    assert tuple(got) == ("b", "head")
    assert all(np.array_equal(got[name], want[name]) for name in got)


@RULES
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_positive_and_finite_is_refused(rule: type, weight: float) -> None:
    with pytest.raises(UserError, match="the weight of an update is"):
        rule(STATES[:2], [1.0, weight])


@RULES
def test_weights_too_large_to_add_are_refused_not_lost(rule: type) -> None:
    with pytest.raises(UserError, match="the weight of an update is"):
        rule(STATES[:2], [1.7e308, 1.7e308])
    with pytest.raises(NonFiniteError, match="tensor"):
        rule([_state(0, scale=1e10)], [1e305])


@RULES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_by_tensor(rule: type, value: float) -> None:
    bad = {name: array.copy() for name, array in STATES[1].items()}
    bad["b"][2, 1] = value
    with pytest.raises(NonFiniteError, match="tensor b holds NaN or infinity"):
        rule([STATES[0], AdapterState(SPEC, bad)], [1.0, 1.0])


def test_they_are_refused_on_arrival_so_that_the_site_can_be_named() -> None:
    mean = RunningMean()
    mean.add(STATES[0], 1.0)
    with pytest.raises(NonFiniteError, match="tensor head"):
        mean.add(AdapterState(SPEC, {**STATES[1], "head": np.full((2, 4), np.nan)}), 1.0)
    assert mean.result() == _mean(STATES[:1], [1.0])


@RULES
def test_another_rank_is_refused_with_the_mend(rule: type) -> None:
    other = replace(SPEC, tensors=(replace(SPEC.tensors[0], shape=(2, 5)), *SPEC.tensors[1:]))
    other = replace(other, tensors=tuple(replace(t, name=n) for t, n in zip(other.tensors, SPEC.names, strict=True)))
    with pytest.raises(UserError, match=r"tensor a has shape \[2, 5\], expected \[3, 5\]"):
        rule([STATES[0], _state(1, other)], [1.0, 1.0])


@RULES
def test_other_tensors_are_refused_by_name(rule: type) -> None:
    with pytest.raises(UserError, match="two updates differ in their tensors: head"):
        rule([STATES[0], STATES[1].only(["a", "b", "scalar"])], [1.0, 1.0])


@RULES
@pytest.mark.parametrize("pair", [replace(PAIR, scaling=4.0), replace(PAIR, fan_in_fan_out=True)])
def test_factors_under_another_scale_or_layout_are_refused(rule: type, pair: LowRankPair) -> None:
    """Right shapes, wrong meaning: their mean would be worse than no mean."""
    with pytest.raises(
        UserError, match=r"scale or lay out their low-rank factors differently; set method\.alpha alike"
    ):
        rule([STATES[0], _state(1, replace(SPEC, pairs=(pair,)))], [1.0, 1.0])


@RULES
def test_a_refused_update_leaves_no_trace(rule: type) -> None:
    mean = RunningMean()
    mean.add(STATES[0], 1.0)
    for bad in (STATES[1].only(["a"]), _state(1, replace(SPEC, pairs=()))):
        with pytest.raises(UserError):
            mean.add(bad, 1.0)
    mean.add(STATES[1], 1.0)
    want = _mean(STATES[:2], [1.0, 1.0])
    assert mean.result() == want and mean.weight == 2.0


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no update arrived"):
        RunningMean().result()
    rule = FedIT()
    rule.start_round(STATES[0])
    with pytest.raises(UserError, match="no update arrived"):
        rule.result()


def test_a_round_forgets_the_last() -> None:
    rule = FedIT()
    for states in (STATES[:2], STATES[2:]):
        rule.start_round(states[0])
        for state in states:
            rule.add(Update("s", state, 1.0))
        assert rule.result() == _mean(states, [1.0, 1.0])


def test_the_result_is_a_value_of_its_own() -> None:
    mean = RunningMean()
    mean.add(STATES[0], 1.0)
    first = mean.result()
    before = first.digest
    mean.add(STATES[1], 5.0)
    mean.result()
    assert AdapterState(SPEC, dict(first)).digest == before


def test_a_mean_that_is_taken_is_the_result_and_ends_the_sum() -> None:
    kept, taken = RunningMean(), RunningMean()
    for mean in (kept, taken):
        mean.add(STATES[0], 1.0)
        mean.add(STATES[1], 3.0)
    assert taken.take() == kept.result()
    assert taken.take() == taken.result() == kept.result()
    with pytest.raises(ValueError, match="the mean was taken"):
        taken.add(STATES[0], 1.0)


def test_the_sum_takes_less_than_three_states_beside_the_update() -> None:
    spec = AdapterSpec(method="m", tensors=tuple(TensorSpec(f"x{k}", (5_000,)) for k in range(40)))
    size = 4 * spec.parameters
    rule = FedIT()
    tracemalloc.start()
    rule.start_round(AdapterState(spec, {t.name: np.zeros(t.shape, np.float32) for t in spec.tensors}))
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for seed in range(5):
        random = np.random.default_rng(seed)
        noise = {t.name: random.standard_normal(t.shape, dtype=np.float32) for t in spec.tensors}
        for array in noise.values():
            array.flags.writeable = False
        rule.add(Update("site", AdapterState(spec, noise), 1.0))
        del noise, array
    streaming = tracemalloc.get_traced_memory()[1] - before - size
    tracemalloc.reset_peak()
    rule.result()
    closing = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert streaming < 3 * size and closing < 3 * size


def test_memory_does_not_grow_with_the_sites() -> None:
    spec = AdapterSpec(method="m", tensors=(TensorSpec("x", (50_000,)),))
    mean = RunningMean()
    mean.add(_state(0, spec), 1.0)
    tracemalloc.start()
    held = tracemalloc.get_traced_memory()[0]
    for seed in range(30):
        mean.add(_state(seed, spec), 1.0)
    grown = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    assert grown < 50_000


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """What FedIT does not claim, so that nobody adds the flag."""
    assert not FedIT.capabilities.exact and FedIT.capabilities.linear_sum
    got = _fedit(STATES[:2], [1.0, 1.0])
    true = (STATES[0].delta(PAIR) + STATES[1].delta(PAIR)) / 2
    assert np.abs(got.delta(PAIR) - true).max() > 0.1 * np.abs(true).max()
