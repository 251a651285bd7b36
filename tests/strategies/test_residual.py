"""FedEx-LoRA and FRLoRA against their equations, written out with dense matrices in float64, over several rounds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec, offset_a
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator

SHAPES = ((40, 31), (26, 45))
RANK, ALPHA = 3, 5.0
WEIGHTS = {"east": 3.0, "north": 10.0, "south": 0.5, "west": 4.0}
P = {site: weight / sum(WEIGHTS.values()) for site, weight in WEIGHTS.items()}
#: Offsets are kept in float32, and rounded once a round.
TOLERANCE = 1e-6


def _spec(*, flipped: bool = False, root: bool = False) -> AdapterSpec:
    tensors, pairs = [], []
    for index, (m, n) in enumerate(SHAPES):
        tensors += [TensorSpec(f"{index}.a", (RANK, n), role="lora_A"), TensorSpec(f"{index}.b", (m, RANK))]
        pairs.append(LowRankPair(f"{index}.a", f"{index}.b", ALPHA / (RANK**0.5 if root else RANK), flipped))
    tensors += [TensorSpec("head", (2, 3), role="head"), TensorSpec("frozen", (2,), policy="freeze")]
    return AdapterSpec("lora", tuple(tensors), tuple(pairs), rank=RANK, alpha=ALPHA)


SPECS = {"plain": _spec(), "transposed base": _spec(flipped=True), "alpha over root of rank": _spec(root=True)}
ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def _drawn(spec: AdapterSpec, seed: int, zero: Sequence[str] = ()) -> AdapterState:
    random = np.random.default_rng(seed)
    return AdapterState(
        spec, {t.name: (random.standard_normal(t.shape) * (t.name not in zero)).astype(t.dtype) for t in spec.tensors}
    )


def _fresh(spec: AdapterSpec) -> AdapterState:
    return _drawn(spec, 0, zero=[pair.b for pair in spec.pairs])


def _round(
    rule: Aggregator, state: AdapterState, number: int, sites: Sequence[str] = tuple(WEIGHTS)
) -> tuple[AdapterState, dict[str, AdapterState]]:
    """The next global adapter, and the whole adapters of the sites that it is made of."""
    rule.round = number
    rule.start_round(state)
    trained = {}
    for site in sites:
        received = rule.for_site(state, site)
        other = _drawn(received.spec, 100 * number + ord(site[0]))
        names = received.spec.select("share")
        trained[site] = AdapterState(received.spec, {**received, **{name: other[name] for name in names}})
        rule.add(Update(site, trained[site].only(names), WEIGHTS[site]))
    return rule.result(), trained


def _mean(trained: Mapping[str, AdapterState], name: str) -> np.ndarray:
    total = sum(WEIGHTS[site] for site in trained)
    return np.asarray(sum(WEIGHTS[site] * whole[name].astype(np.float64) for site, whole in trained.items())) / total


def _same(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


# FedEx


@ALL
def test_fedex_adds_what_the_mean_of_factors_misses(spec: AdapterSpec) -> None:
    rule = create_aggregator("fedex")
    state = rule.prepare(_fresh(spec))
    base = [np.zeros(shape) for shape in SHAPES]
    for number in range(1, 5):
        state, trained = _round(rule, state, number)
        for position, pair in enumerate(spec.pairs):
            a, b = _mean(trained, pair.a), _mean(trained, pair.b)
            np.testing.assert_allclose(state[pair.a], a, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(state[pair.b], b, rtol=1e-6, atol=1e-7)
            product = sum(
                P[k] * (w[pair.b].astype(np.float64) @ w[pair.a].astype(np.float64)) for k, w in trained.items()
            )
            residual = pair.scaling * (product - b @ a)
            # Without it, what FedIT gives is wrong by most of its size.
            assert np.linalg.norm(residual) > 0.5 * np.linalg.norm(pair.scaling * product)
            base[position] += residual
            _same(state.delta(pair), base[position] + pair.scaling * (b @ a))
            # And this is the mean of what the sites compute with.
            _same(state.delta(pair), np.asarray(sum(P[k] * w.delta(pair) for k, w in trained.items())))
        np.testing.assert_allclose(state["head"], _mean(trained, "head"), rtol=1e-6, atol=1e-7)
        assert np.array_equal(state["frozen"], _fresh(spec)["frozen"])


def test_the_residual_of_fedex_has_no_more_directions_than_it_must() -> None:
    rule, state = create_aggregator("fedex"), _fresh(_spec())
    found = []
    for number in range(1, 6):
        state, _ = _round(rule, state, number)
        found.append([len(state[offset_a(pair)]) for pair in state.spec.pairs])
    # (K - 1) r a round, until there is no room for more.
    assert found == [[9, 9], [18, 18], [27, 26], [31, 26], [31, 26]]


def test_one_site_leaves_no_residual() -> None:
    rule, state = create_aggregator("fedex"), _fresh(_spec())
    for number in (1, 2):
        state, trained = _round(rule, state, number, ["north"])
        assert all(
            np.array_equal(state[name], trained["north"][name]) for name in trained["north"].spec.select("share")
        )
        assert state.spec.extras == ()


def test_equal_factors_a_leave_no_residual() -> None:
    """The mean of B_k A is the mean of B_k times A; rounding must not be taken for a change."""
    rule, state = create_aggregator("fedex"), _fresh(_spec())
    rule.start_round(state)
    for k, site in enumerate(WEIGHTS):
        other = dict(_drawn(state.spec, k))
        other |= {pair.a: _drawn(state.spec, 50)[pair.a] for pair in state.spec.pairs}
        names = state.spec.select("share")
        rule.add(Update(site, AdapterState(state.spec, {n: other[n] for n in names}, names=names), WEIGHTS[site]))
    assert rule.result().spec.extras == ()


@pytest.mark.parametrize("name", ["fedex", "frlora"])
def test_the_order_of_the_sites_does_not_matter(name: str) -> None:
    options = {"factors": "initial"} if name == "frlora" else {}
    start, _ = _round(create_aggregator(name, options), _fresh(_spec()), 1)
    want, _ = _round(create_aggregator(name, options), start, 2)
    for order in itertools.permutations(WEIGHTS):
        got, _ = _round(create_aggregator(name, options), start, 2, order)
        assert got.spec == want.spec
        for pair in got.spec.pairs:
            _same(got.delta(pair), want.delta(pair))


@pytest.mark.parametrize("name", ["fedex", "frlora"])
def test_a_run_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    options = {"factors": "initial"} if name == "frlora" else {}
    state, _ = _round(create_aggregator(name, options), _fresh(_spec()), 1)
    state.save(tmp_path / "state.safetensors")
    loaded = AdapterState.load(tmp_path / "state.safetensors")
    assert loaded == state and loaded.spec.extras
    goes_on = _round(create_aggregator(name, options), loaded, 2)[0]
    assert goes_on == _round(create_aggregator(name, options), state, 2)[0]


def test_a_cap_keeps_the_best_change_and_gives_up_the_claim() -> None:
    exact, capped = create_aggregator("fedex"), create_aggregator("fedex", {"max_rank": 4})
    assert exact.capabilities.exact and not capped.capabilities.exact
    assert type(capped).capabilities.exact, "the class is as it was"
    assert replace(capped.capabilities, exact=True) == exact.capabilities
    whole, _ = _round(exact, _fresh(_spec()), 1)
    part, _ = _round(capped, _fresh(_spec()), 1)
    for pair in whole.spec.pairs:
        assert len(part[offset_a(pair)]) == 4
        own = pair.scaling * (whole[pair.b].astype(float) @ whole[pair.a].astype(float))
        u, s, vt = np.linalg.svd(whole.delta(pair) - own)
        _same(part.delta(pair) - own, (u[:, :4] * s[:4]) @ vt[:4], 1e-5)
        assert np.linalg.norm(part.delta(pair) - whole.delta(pair)) > 0.1 * np.linalg.norm(whole.delta(pair))


@pytest.mark.parametrize("name", ["fedex", "frlora", "lora-fair", "flora-na"])
def test_an_update_of_another_rank_is_refused_before_anything_is_added(name: str) -> None:
    rule, state = create_aggregator(name, {"factors": "initial"} if name == "frlora" else {}), _fresh(_spec())
    rule.start_round(state)
    names = state.spec.select("share")
    good = Update("east", _drawn(state.spec, 1).only(names), 1.0)
    rule.add(good)
    with pytest.raises(UserError, match=r"north: tensor 0\.a has shape \[2, 31\], expected \[3, 31\]"):
        rule.add(Update("north", _drawn(state.spec.with_rank(2), 2).only(names), 1.0))
    result = rule.result()
    rule.start_round(state)
    rule.add(good)
    assert rule.result() == result


# FRLoRA


def _weights() -> list[np.ndarray]:
    random = np.random.default_rng(9)
    return [random.standard_normal(shape) for shape in SHAPES]


def _principal(spec: AdapterSpec) -> dict[str, np.ndarray]:
    """s B0 A0 = SVD_r(W0), from whole decompositions."""
    found: dict[str, np.ndarray] = {}
    for pair, weight in zip(spec.pairs, _weights(), strict=True):
        u, s, vt = np.linalg.svd(weight)
        root = np.sqrt(s[:RANK] / pair.scaling)
        found |= {
            pair.b: (u[:, :RANK] * root).astype("float32"),
            pair.a: (root[:, None] * vt[:RANK]).astype("float32"),
        }
    return found


def _frlora(**options: Any) -> Aggregator:
    rule = create_aggregator("frlora", options)
    rule.principal = lambda state: _principal(state.spec)
    return rule


@ALL
def test_frlora_adds_the_change_of_the_mean_product_and_begins_again(spec: AdapterSpec) -> None:
    rule = _frlora()
    state = rule.prepare(_fresh(spec))
    first = _principal(spec)
    weights = _weights()
    for pair, weight in zip(spec.pairs, weights, strict=True):
        # The principal part trains, the rest is what stands still; together they are W0.
        u, s, vt = np.linalg.svd(weight)
        product = pair.scaling * (state[pair.b].astype(float) @ state[pair.a].astype(float))
        _same(product, (u[:, :RANK] * s[:RANK]) @ vt[:RANK])
        assert np.linalg.norm(state.delta(pair)) <= TOLERANCE * s[0]
    for number in range(1, 5):
        state, trained = _round(rule, state, number)
        for position, pair in enumerate(spec.pairs):
            a, b = _mean(trained, pair.a), _mean(trained, pair.b)
            a0, b0 = first[pair.a].astype(float), first[pair.b].astype(float)
            weights[position] = weights[position] + pair.scaling * (b @ a - b0 @ a0)
            change = weights[position] - _weights()[position]
            assert np.linalg.norm(state.delta(pair) - change) <= TOLERANCE * np.linalg.norm(weights[position])
            assert np.array_equal(state[pair.a], first[pair.a]) and np.array_equal(state[pair.b], first[pair.b])
        np.testing.assert_allclose(state["head"], _mean(trained, "head"), rtol=1e-6, atol=1e-7)


def test_frlora_goes_to_a_higher_rank_than_a_rounds() -> None:
    rule = _frlora()
    state = rule.prepare(_fresh(_spec()))
    for number in (1, 2, 3):
        state, _ = _round(rule, state, number)
    ranks = [np.linalg.matrix_rank(state.delta(pair), tol=1e-4) for pair in state.spec.pairs]
    # Three products of three new directions each, less those of A0 and B0.
    assert ranks == [12, 12]


def test_frlora_gives_one_site_back_what_it_computes_with() -> None:
    rule = _frlora()
    state = rule.prepare(_fresh(_spec()))
    for number in (1, 2, 3):
        state, trained = _round(rule, state, number, ["west"])
        for pair in state.spec.pairs:
            _same(state.delta(pair), trained["west"].delta(pair))


def test_frlora_keeps_what_a_given_adapter_does() -> None:
    given = _drawn(_spec(), 4)
    state = _frlora().prepare(given)
    for pair in given.spec.pairs:
        _same(state.delta(pair), given.delta(pair))
        assert np.array_equal(state[pair.a], _principal(given.spec)[pair.a])
    begun = _frlora(factors="initial").prepare(given)
    assert begun == given


def test_frlora_without_the_base_weights_is_refused_with_the_mend() -> None:
    rule = create_aggregator("frlora")
    with pytest.raises(UserError, match="base weights, which are not at hand here; set strategy_options"):
        rule.prepare(_fresh(_spec()))
    assert create_aggregator("frlora", {"factors": "initial"}).prepare(_fresh(_spec())) == _fresh(_spec())


@pytest.mark.parametrize("name", ["fedex", "frlora", "lora-fair", "flora-na", "fedrot"])
def test_a_method_without_factors_is_refused(name: str) -> None:
    spec = AdapterSpec("bitfit", (TensorSpec("bias", (3,)),))
    with pytest.raises(
        UserError, match=f"strategy `{name}` works on the factors of a low-rank method; bitfit has none"
    ):
        create_aggregator(name).prepare(_drawn(spec, 0))


@pytest.mark.parametrize("name", ["flora", "fedex", "frlora", "lora-fair", "flora-na"])
def test_a_factor_that_the_configuration_keeps_back_is_refused_before_a_site_trains(name: str) -> None:
    rule = create_aggregator(name, {"factors": "initial"} if name == "frlora" else {})
    for kept in ("0.a", "1.b"):
        spec = _spec().with_policy("freeze", lambda tensor, kept=kept: tensor.name == kept)
        with pytest.raises(
            UserError, match=f"strategy `{name}` needs both factors of a pair, and .* keeps back {kept}"
        ):
            rule.start_round(_drawn(spec, 0))
    both = _spec().with_policy("local", lambda tensor: tensor.name in ("0.a", "0.b"))
    state, _ = _round(rule, _drawn(both, 0), 1)
    assert all(np.array_equal(state[factor], _drawn(both, 0)[factor]) for factor in ("0.a", "0.b") if factor in state)
