"""MerA: the best of all permutations of units, found again where units were only shuffled, signed and rescaled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.strategies.merging.transport import _even, aligned


def _disguised(state: AdapterState, seed: int) -> AdapterState:
    """The same adapter with its units in another order, signs flipped and lengths moved between the halves."""
    draw = np.random.default_rng(seed)
    arrays = dict(state)
    for pair in state.spec.pairs:
        rank = state[pair.a].shape[0]
        order, scale = draw.permutation(rank), draw.uniform(0.3, 3, rank) * draw.choice([-1, 1], rank)
        arrays[pair.b] = state[pair.b][:, order] * scale
        arrays[pair.a] = state[pair.a][order] / scale[:, None]
    return AdapterState(state.spec, arrays)


def test_disguised_copies_merge_into_the_adapter_itself(zoo: Any) -> None:
    first = zoo.adapter("north", 1, 4)
    adapters = [first, *(replace(first, name=f"copy-{i}", state=_disguised(first.state, i)) for i in range(3))]
    merged = zoo.merge("mera", adapters)
    zoo.close(zoo.dense(merged.state), zoo.dense(first.state), 1e-12)
    assert "0.000 away" in merged.notes[0]
    # Averaging the factors as they are loses most of it.
    plain = zoo.dense(zoo.merge("uniform", adapters, on="factors").state)["up"]
    assert np.linalg.norm(plain - zoo.dense(first.state)["up"]) > 0.3 * np.linalg.norm(plain)


def test_the_alignment_is_the_cheapest_of_all_permutations() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        x, reference = ((draw.standard_normal((6, 4)), draw.standard_normal((4, 5))) for _ in range(2))

        def cost(order: Any, x: Any = x, reference: Any = reference) -> float:
            units = [np.outer(x[0][:, j], x[1][j]) for j in order]
            return sum(
                float(np.sum((np.outer(reference[0][:, i], reference[1][i]) - unit) ** 2))
                for i, unit in enumerate(units)
            )

        order, (b, a) = aligned(x, reference)
        assert cost(order) == pytest.approx(min(cost(p) for p in itertools.permutations(range(4))), rel=1e-12)
        np.testing.assert_allclose(b @ a, x[0] @ x[1], atol=1e-12)


def test_merged_factors_are_the_means_of_aligned_ones(zoo: Any, weights: Any) -> None:
    """The naive twin: every permutation and sign tried, halves of equal length, then plain means."""
    adapters = zoo.alike()
    merged = zoo.dense(zoo.merge("mera", adapters).state)
    p = weights(adapters)
    for pair in adapters[0].state.spec.pairs:
        units = []
        for x in adapters:
            own = next(q for q in x.state.spec.pairs if q.a == pair.a)
            outer = [own.scaling * np.outer(x.state[own.b][:, j], x.state[own.a][j]) for j in range(3)]
            split = []
            for unit in outer:
                u, s, vt = np.linalg.svd(unit)
                split.append((u[:, 0] * np.sqrt(s[0]), vt[0] * np.sqrt(s[0])))
            units.append((outer, split))
        reference, b, a = units[0], np.zeros((units[0][0][0].shape[0], 3)), np.zeros((3, units[0][0][0].shape[1]))
        for weight, (outer, split) in zip(p, units, strict=True):
            best = min(
                itertools.permutations(range(3)),
                key=lambda order, outer=outer: sum(
                    np.sum((reference[0][i] - outer[j]) ** 2) for i, j in enumerate(order)
                ),
            )
            for i, j in enumerate(best):
                left, right = split[j]
                sign = np.sign(left @ reference[1][i][0] + right @ reference[1][i][1])
                b[:, i] += weight * sign * left
                a[i] += weight * sign * right
        np.testing.assert_allclose(merged[pair.a.partition(".")[0]], b @ a, atol=1e-9)


def test_units_of_zero_stay_zero() -> None:
    b, a = _even((np.array([[1.0, 0.0, 2.0]]), np.array([[4.0], [3.0], [0.0]])))
    np.testing.assert_allclose(b, [[2.0, 0.0, 0.0]])
    np.testing.assert_allclose(a, [[2.0], [0.0], [0.0]])


def test_a_smaller_adapter_moves_only_onto_units_that_gain_by_it(zoo: Any) -> None:
    whole = zoo.adapter("north", 1, 4)
    part = zoo.adapter("south", 1, 2)
    keep = {}
    for pair in whole.state.spec.pairs:
        keep |= {pair.a: whole.state[pair.a][[3, 1]], pair.b: whole.state[pair.b][:, [3, 1]] / 2}
    state = AdapterState(part.state.spec, {**part.state, **keep})
    merged = zoo.dense(zoo.merge("mera", [whole, replace(part, state=state)]).state)
    for pair in whole.state.spec.pairs:
        units = [pair.scaling * np.outer(whole.state[pair.b][:, j], whole.state[pair.a][j]) for j in range(4)]
        want = units[1] + units[3] + (units[0] + units[2]) / 4  # half of each factor where the other has none
        np.testing.assert_allclose(merged[pair.a.partition(".")[0]], want, atol=1e-10)


def test_it_says_how_far_it_is_from_the_mean_of_products(zoo: Any) -> None:
    adapters = zoo.alike()
    merged = zoo.merge("mera", adapters)
    got, exact = zoo.dense(merged.state), zoo.dense(zoo.merge("uniform", adapters, 9).state)
    far = np.sqrt(sum(np.sum((got[k] - exact[k]) ** 2) for k in got) / sum(np.sum(exact[k] ** 2) for k in got))
    assert f"{far:.3f} away" in merged.notes[0]
