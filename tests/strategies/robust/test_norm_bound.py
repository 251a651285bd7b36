"""Norm bounding against its definition, as a sum, and with a bound that follows the lengths seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import LocalRule, Training, create_aggregator
from fedgraft.strategies.robust.norm_bound import Cutting

TRAINING = Training("north", 1, 3, 0.1)


def test_each_change_is_cut_to_the_bound_and_averaged_alike(bench: Any) -> None:
    start, sent = bench.start(), bench.sent(5)
    sent[1] = start + 50.0 * (sent[1] - start)
    bound = 2.0
    want = {name: np.zeros(array.shape) for name, array in start.items()}
    for state in sent:
        length = np.sqrt(sum(np.sum((state[n] - start[n]) ** 2) for n in start))
        for name in want:
            want[name] += (start[name] + min(1.0, bound / length) * (state[name] - start[name])) / len(sent)
    got = bench.aggregate("norm-bound", sent, weights=[1.0, 1e9, 1.0, 1.0, 1.0], norm=bound)
    bench.close(got, want)


def test_changes_within_the_bound_pass_as_they_are(bench: Any) -> None:
    sent, weights = bench.sent(5), [5.0, 1.0, 2.0, 2.0, 7.0]
    got = bench.aggregate("norm-bound", sent, weights=weights, norm=100.0, weigh=True)
    assert got == bench.aggregate("fedit", sent, weights=weights)
    assert bench.aggregate("norm-bound", sent[:1], norm=100.0) == sent[0]


def test_dw_is_bounded_whatever_the_factors(bench: Any, gauged: Callable[..., AdapterState]) -> None:
    start = bench.start()
    for seed in range(4):
        sent = gauged(bench.near(start, seed, step=1.0), seed)
        got = bench.aggregate("norm-bound", [sent], norm=0.7, measure="dW")
        assert np.linalg.norm(bench.dense(got) - bench.dense(start)) == pytest.approx(0.7, rel=1e-9)
        # The other measure bounds the factors, and dW by what the docstring says.
        got = bench.aggregate("norm-bound", [sent], norm=0.7)
        assert (got - start).norm() == pytest.approx(0.7, rel=1e-9)
        for pair in start.spec.pairs:
            factors = np.linalg.norm(start[pair.a]) + np.linalg.norm(start[pair.b])
            most = pair.scaling * (0.7 * factors + 0.7**2 / 2)
            assert np.linalg.norm(got.delta(pair) - start.delta(pair)) <= most


def test_it_works_under_a_secure_sum_where_the_sites_cut(bench: Any) -> None:
    """Sites cut by themselves and add masks that cancel; the server sees masked updates and adds them up."""
    start, sent = bench.start(), bench.sent(6)
    sent[2] = start - 30.0 * (sent[2] - start)
    want = bench.aggregate("norm-bound", sent, norm=1.5)
    site = create_aggregator("norm-bound", {"norm": 1.5, "cut_by": "sites"})
    masks = [bench.state(100 + k, 1000.0) for k in range(6)]
    masked = []
    for k, state in enumerate(sent):
        rule = site.local(TRAINING, {})
        assert rule is not None
        masked.append(rule.finish(state, start) + masks[k] - masks[(k + 1) % 6])
    got = bench.aggregate("norm-bound", masked, norm=1.5, cut_by="sites")
    # Masks of a thousand take three digits of sixteen.
    bench.close(got, want, rtol=1e-11)


def test_only_where_the_sites_cut_is_it_a_sum() -> None:
    def sums(**options: Any) -> bool:
        return create_aggregator("norm-bound", options).capabilities.linear_sum

    assert sums(cut_by="sites") and sums(cut_by="sites", measure="dW")
    assert not sums() and not sums(cut_by="sites", then="krum")
    assert create_aggregator("norm-bound", {"then": "krum"}).capabilities.needs_individual
    assert not create_aggregator("norm-bound").capabilities.needs_individual
    assert create_aggregator("norm-bound").local(TRAINING, {}) is None
    with pytest.raises(UserError, match="past needs the lengths before the cut"):
        create_aggregator("norm-bound", {"cut_by": "sites", "past": 2})


def test_the_bound_follows_the_median_length_of_past_rounds(bench: Any) -> None:
    start, rule = bench.start(), create_aggregator("norm-bound", {"norm": 5.0, "past": 2, "factor": 1.5})
    lengths = ([1.0, 2.0, 900.0], [4.0, 4.0, 4.0], [8.0, 8.0, 8.0])
    bounds = []
    for asked in lengths:
        step = bench.near(start, 3) - start
        bench.aggregate(rule, [start + (length / step.norm()) * step for length in asked], start)
        bounds.append(rule.bound)  # type: ignore[attr-defined]
    # 1.5 times: the median of (1, 2, 900); of 2 and 4; of 4 and 8. The cut of the first round does not count.
    assert bounds == pytest.approx([3.0, 4.5, 9.0])


def test_the_bound_survives_a_restart(bench: Any) -> None:
    rule = create_aggregator("norm-bound", {"past": 3})
    bench.aggregate(rule, bench.sent(3))
    bench.aggregate(rule, bench.sent(4))
    again = create_aggregator("norm-bound", {"past": 3})
    again.recall(rule.memory())
    assert again.bound == rule.bound != 10.0  # type: ignore[attr-defined]
    again.recall({})
    wrong = AdapterState(bench.spec, dict(bench.start()))
    with pytest.raises(UserError, match="memory of norm-bound is not one that this version wrote"):
        again.recall({"norm-bound": wrong})


def test_memory_does_not_grow_with_the_sites(bench: Any) -> None:
    import tracemalloc

    rule = create_aggregator("norm-bound", {"norm": 0.1})
    sent = bench.sent(2)
    rule.start_round(bench.start())

    def peak(count: int) -> int:
        tracemalloc.start()
        for k in range(count):
            rule.add(Update(f"s{k}", sent[k % 2], 1.0))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    # Beside a length a site, which is a number.
    assert peak(1000) < 2 * peak(10) + 1000 * 200


class _Adds(LocalRule):
    """An inner rule whose every part can be seen."""

    needs_loss = True

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        return trained + trained

    def trains(self, spec: AdapterSpec, step: int) -> tuple[str, ...]:
        return ("head",)

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        return gradient + value

    def remember(self) -> dict[str, AdapterState]:
        return {"kept": self.memory["kept"]}


def test_the_site_cuts_what_the_strategy_behind_it_would_send(bench: Any) -> None:
    start, trained = bench.start(), bench.near(bench.start(), 3)
    memory = {"kept": start}
    inner = _Adds(TRAINING, memory)
    rule = Cutting(TRAINING, memory, inner, lambda received, sent: received + 0.5 * (sent - received))
    bench.close(rule.finish(trained, start), 0.5 * start + trained)
    assert rule.needs_loss and rule.trains(start.spec, 0) == ("head",) and rule.remember() == memory
    assert rule.direction("head", 1.0, 2.0, 0.0, 0) == 3.0
    assert rule.begin(start) is start and rule.personal() is None


def test_what_stays_at_the_site_is_not_cut(bench: Any) -> None:
    spec = bench.spec.with_policy("local", lambda tensor: tensor.name == "head")
    received, trained = bench.state(99, spec=spec), bench.state(1, 5.0, spec=spec)
    rule = create_aggregator("norm-bound", {"norm": 1.0, "cut_by": "sites"}).local(TRAINING, {})
    assert rule is not None
    got = rule.finish(trained, received)
    assert np.array_equal(got["head"], trained["head"])
    shared = spec.select("share")
    assert (got.only(shared) - received.only(shared)).norm() == pytest.approx(1.0, rel=1e-9)
