"""FedASK: two passes of sums that give the best rank r of the mean, if the sketch is wide enough, and only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Training, create_aggregator
from fedgraft.strategies.fedask import basis_q, sketch_p, sketch_y

RANK = 4
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("q.a", (RANK, 30)),
        TensorSpec("q.b", (26, RANK)),
        TensorSpec("v.a", (RANK, 22)),
        TensorSpec("v.b", (33, RANK)),
        TensorSpec("head", (3,)),
    ),
    (LowRankPair("q.a", "q.b", 0.5), LowRankPair("v.a", "v.b", 0.5, fan_in_fan_out=True)),
    rank=RANK,
    alpha=2.0,
)
RANKS = {"east": 4, "north": 2, "south": 3, "west": 4}
WEIGHTS = {"east": 1.0, "north": 5.0, "south": 2.0, "west": 0.5}


def _trained(state: AdapterState, seed: int) -> AdapterState:
    random = np.random.default_rng(seed)
    names = state.spec.bare.names
    moved = {n: (state[n] + random.standard_normal(state[n].shape)).astype(np.float32) for n in names}
    return AdapterState(state.spec, {**state, **moved})


def _start() -> AdapterState:
    random = np.random.default_rng(77)
    return AdapterState(SPEC, {t.name: random.standard_normal(t.shape).astype(np.float32) for t in SPEC.tensors})


def _round(
    ranks: Mapping[str, int] = RANKS, *, second: Sequence[str] = tuple(RANKS), frozen: bool = False, **options: Any
) -> tuple[AdapterState, dict[str, AdapterState]]:
    """One round: the new global adapter, and what each site trained."""
    rule = create_aggregator("fedask", options)
    rule.ranks = ranks
    state = rule.prepare(_start())
    rule.round = 3
    rule.start_round(state)
    trained, memories = {}, {}
    for seed, site in enumerate(sorted(ranks)):
        received = rule.for_site(state, site)
        local = rule.local(Training(site, 3, 1, 0.1), {})
        assert local is not None
        trained[site] = _trained(local.begin(received), seed)
        if frozen:
            a = {name: received[name] for name in ("q.a", "v.a")}
            trained[site] = AdapterState(received.spec, {**trained[site], **a})
        sent = local.finish(trained[site], received).only(received.spec.select("share"))
        assert set(sent) == {"head", "q.b.sketch", "v.b.sketch"}, "no factor leaves the site"
        memories[site] = local.remember()
        rule.add(Update(site, sent, WEIGHTS[site]))
    asked = rule.second_pass()
    assert asked is not None
    for site in second:
        received = rule.for_site(asked, site)
        local = rule.local(Training(site, 3, 1, 0.1), memories[site])
        assert local is not None
        answer = local.refine(received)
        assert set(answer) == set(received.spec.select("share")) == {"q.a.sketch", "v.a.sketch"}
        rule.add_refined(Update(site, answer, WEIGHTS[site]))
    result = rule.result()
    assert result.spec == state.spec
    return result, trained


def _mean(trained: Mapping[str, AdapterState], number: int) -> np.ndarray:
    total = sum(WEIGHTS[site] for site in trained)
    return sum(WEIGHTS[s] / total * state.delta(state.spec.pairs[number]) for s, state in trained.items())


def _best(dense: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_the_default_sketch_gives_the_best_rank_r_of_the_mean_over_mixed_ranks() -> None:
    got, trained = _round()
    for number, pair in enumerate(SPEC.pairs):
        assert _error(got.delta(pair), _best(_mean(trained, number), RANK)) < 1e-6
        assert got.spec.by_name[sketch_y(pair)].shape[1] == sum(RANKS.values())
        left, right = got[pair.b].astype(np.float64), got[pair.a].astype(np.float64)
        np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-4)
    total = sum(WEIGHTS.values())
    want = sum(WEIGHTS[site] * state["head"].astype(np.float64) for site, state in trained.items()) / total
    np.testing.assert_allclose(got["head"], want, rtol=1e-5, atol=1e-6)
    assert not got["q.b.sketch"].any(), "a round's sketches are not kept"


@pytest.mark.parametrize(("less", "exact"), [(0, True), (1, False)])
def test_it_is_exact_if_and_only_if_the_sketch_reaches_the_rank_of_the_mean(less: int, exact: bool) -> None:
    got, trained = _round(q=sum(RANKS.values()) - less)
    for number, pair in enumerate(SPEC.pairs):
        assert (_error(got.delta(pair), _best(_mean(trained, number), RANK)) < 1e-6) is exact


def test_a_sketch_of_rank_r_loses_more_than_it_must_where_a_moves_and_nothing_where_it_is_frozen() -> None:
    moving, trained = _round(q=RANK)
    still, fixed = _round(dict.fromkeys(RANKS, RANK), q=RANK, frozen=True)
    for number, pair in enumerate(SPEC.pairs):
        want = _mean(trained, number)
        assert _error(moving.delta(pair), want) > 1.15 * _error(_best(want, RANK), want)
        assert _error(still.delta(pair), _mean(fixed, number)) < 1e-6


def test_one_site_comes_back_as_itself() -> None:
    for rank in (2, RANK):
        got, trained = _round({"north": rank}, second=("north",))
        for number, pair in enumerate(SPEC.pairs):
            assert _error(got.delta(pair), _mean(trained, number)) < 1e-6


def test_the_mean_is_over_the_sites_that_answered_twice() -> None:
    got, trained = _round(second=("east", "south"))
    both = {site: trained[site] for site in ("east", "south")}
    for number, pair in enumerate(SPEC.pairs):
        assert _error(got.delta(pair), _best(_mean(both, number), RANK)) < 1e-6


def test_the_second_question_is_a_basis_and_asks_for_nothing_but_its_projection() -> None:
    rule = create_aggregator("fedask")
    rule.ranks = RANKS
    state = rule.prepare(_start())
    assert set(state.spec.select("receive")) == {"q.a", "q.b", "v.a", "v.b"}
    rule.round = 1
    rule.start_round(state)
    local = rule.local(Training("east", 1, 1, 0.1), {})
    assert local is not None
    received = rule.for_site(state, "east")
    rule.add(Update("east", local.finish(_trained(received, 1), received).only(received.spec.select("share")), 1.0))
    asked = rule.second_pass()
    assert asked is not None
    for pair in SPEC.pairs:
        q = asked[basis_q(pair)].astype(np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-6)
    assert asked.spec.select("share") == tuple(sketch_p(pair) for pair in SPEC.pairs)
    assert asked.spec.bare == state.spec.bare


def test_the_sketch_is_no_wider_than_the_change() -> None:
    rule = create_aggregator("fedask", {"q": 1000})
    state = rule.prepare(_start())
    assert [t.shape for t in state.spec.extras] == [(26, 26), (33, 22)]


def test_every_round_has_random_directions_of_its_own() -> None:
    rule = create_aggregator("fedask", {"q": 5})
    state = rule.prepare(_start())
    sketches = []
    for round in (1, 1, 2):
        local = rule.local(Training("east", round, 1, 0.1), {})
        assert local is not None
        sketches.append(local.finish(state, state)["q.b.sketch"])
    assert np.array_equal(sketches[0], sketches[1]) and not np.allclose(sketches[0], sketches[2])


def test_a_site_that_lost_its_memory_says_so() -> None:
    local = create_aggregator("fedask").local(Training("east", 1, 1, 0.1), {})
    assert local is not None
    with pytest.raises(UserError, match="does not remember what it trained"):
        local.refine(_start())


def test_a_federation_ends_where_hlora_does(tiny_federation: Any, tmp_path: Path) -> None:
    """The same product, but the server of fedask sees sums of sketches alone."""
    sites = [{"name": site, "rank": rank} for site, rank in zip(("east", "north", "south"), (1, 4, 2), strict=True)]
    ends = []
    for name in ("fedask", "hlora"):
        config = tiny_federation.config(strategy=name, rounds=2, **{"train.lr": 0.05, "data.sites": sites})
        tiny_federation.run(config, tmp_path / name)
        ends.append(AdapterState.load(tmp_path / name / "checkpoints" / "round-0002" / "adapter.safetensors"))
    for pair in ends[1].spec.pairs:
        assert _error(ends[0].delta(pair), ends[1].delta(pair)) < 1e-3
