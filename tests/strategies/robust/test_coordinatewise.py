"""Median and trimmed mean, number by number, against Python's own and Flower's."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

from fedgraft.core.adapter import AdapterSpec, AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, create_aggregator


def _each(states: list[AdapterState], rule: Callable[[list[float]], float]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in states[0].items():
        found[name] = np.zeros(array.shape)
        for at in itertools.product(*(range(size) for size in array.shape)):
            found[name][at] = rule([float(state[name][at]) for state in states])
    return found


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_the_median_of_each_number(bench: Any, count: int) -> None:
    sent = bench.sent(count)
    bench.close(bench.aggregate("median", sent, weights=[1e9, *[1.0] * (count - 1)]), _each(sent, statistics.median))


@pytest.mark.parametrize(("count", "cut"), [(3, 1), (7, 2), (10, 0), (10, 4)])
def test_the_trimmed_mean_is_that_of_the_definition_and_flowers(bench: Any, count: int, cut: int) -> None:
    sent = bench.sent(count)
    got = bench.aggregate("trimmed-mean", sent, attackers=cut)
    bench.close(got, _each(sent, lambda values: statistics.fmean(sorted(values)[cut : len(values) - cut])))
    theirs = {name: trim_mean(np.stack([state[name] for state in sent]), (cut + 1e-6) / count) for name in got}
    bench.close(got, theirs)


@pytest.mark.parametrize(("rule", "options"), [("median", {}), ("trimmed-mean", {"attackers": 2})])
def test_lies_of_any_size_stay_within_the_honest_numbers(bench: Any, rule: str, options: dict[str, int]) -> None:
    start, honest = bench.start(), bench.sent(8)
    for attack in (-1e9, -1.0, 1e9):
        lies = [start + attack * (state - start) for state in honest[:2]]
        got = bench.aggregate(rule, [*lies, *honest], **options)
        for name in got:
            values = np.stack([state[name] for state in honest])
            assert (got[name] >= values.min(axis=0)).all() and (got[name] <= values.max(axis=0)).all()


def test_a_median_of_b_is_no_median_of_dw(bench: Any) -> None:
    """What the module says of dW, with A frozen: the median does not go through the product."""
    spec = bench.spec.with_policy("freeze", lambda tensor: tensor.role == "lora_A")
    start = bench.state(99, spec=spec)
    sent = [bench.near(start, seed).only(spec.select("share")) for seed in range(5)]
    got = bench.aggregate("median", sent, start).filled_from(start)
    pair = spec.pairs[0]
    of_dw = np.median([state.filled_from(start).delta(pair) for state in sent], axis=0)
    assert np.abs(got.delta(pair) - of_dw).max() > 1e-3


class _Ranks(Aggregator):
    """Hands every site factors of its own, as a server that mixes ranks does."""

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return state * float(site[-1])

    def add(self, update: Update) -> None:
        self.last = update.state

    def result(self) -> AdapterState:
        return self.last


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "bulyan"])
def test_sites_that_began_from_unlike_factors_are_refused(bench: Any, rule: str) -> None:
    aggregator: Any = create_aggregator(rule)
    aggregator.inner = _Ranks()
    aggregator.start_round(bench.start())
    aggregator.add(Update("site-1", bench.start(), 1.0))
    with pytest.raises(UserError, match="site-2: trains from other factors than site-1"):
        aggregator.add(Update("site-2", bench.start(), 1.0))


def test_an_update_of_another_shape_is_refused(bench: Any, specs: Callable[..., AdapterSpec]) -> None:
    aggregator = create_aggregator("median")
    aggregator.start_round(bench.start())
    with pytest.raises(UserError, match=r"north: tensor q\.lora_A\.weight of its update has another shape"):
        aggregator.add(Update("north", bench.state(1, spec=specs(rank=2)), 1.0))


def test_one_update_is_left_so_none_that_looks_at_several_can_follow() -> None:
    with pytest.raises(UserError, match="strategy `median` leaves one update, and `krum` looks at several"):
        create_aggregator("median", {"then": "krum"})
    with pytest.raises(UserError, match="has no such option"):
        create_aggregator("median", {"weigh": True})
