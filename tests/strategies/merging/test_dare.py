"""DARE: its mean over seeds is the weighted mean, its spread that of a Bernoulli, and its masks are one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.strategies.merging import elementwise
from fedgraft.strategies.merging.dare import _mask


def _exact(zoo: Any, adapters: Any, p: np.ndarray) -> dict[str, np.ndarray]:
    dense = [zoo.dense(x.state) for x in adapters]
    return {k: np.tensordot(p, [d[k] for d in dense], 1) for k in dense[0]}


def test_kept_entries_are_divided_by_the_density_and_the_others_gone(zoo: Any) -> None:
    """With one adapter beside one of no change, each entry of the answer is 0 or 1 / d times its own."""
    first = zoo.adapter("north", 1)
    still = replace(first, name="south", state=first.state.map(lambda array: 0 * array))
    merged = zoo.dense(zoo.merge("dare", [first, still], 13, density=0.25).state)
    ratios = np.concatenate([(merged[k] / (x / 2)).reshape(-1) for k, x in zoo.dense(first.state).items()])
    near = np.minimum(np.abs(ratios), np.abs(ratios - 4.0))
    assert near.max() < 1e-6
    kept = np.mean(ratios > 2)
    assert abs(kept - 0.25) < 5 * np.sqrt(0.25 * 0.75 / ratios.size)


@pytest.mark.parametrize(("on", "rank"), [("product", 13), ("factors", 9)])
def test_the_mean_over_seeds_is_the_weighted_mean(on: str, rank: int, zoo: Any, weights: Any) -> None:
    """400 seeds; each entry is within 5 standard errors of the exact one, of which there are 263."""
    adapters = zoo.mixed()
    exact = _exact(zoo, adapters, weights(adapters))
    draws = [
        zoo.dense(zoo.merge("dare", adapters, rank, density=0.5, on=on, context={"seed": seed}).state)
        for seed in range(400)
    ]
    for name, matrix in exact.items():
        found = np.stack([draw[name] for draw in draws])
        error = found.std(axis=0) / np.sqrt(len(draws))
        assert np.max(np.abs(found.mean(axis=0) - matrix) / error) < 5
        if on == "product":
            # Var = sum_k p_k^2 dW_k^2 (1 - d) / d for each entry.
            dense = [zoo.dense(x.state)[name] for x in adapters]
            want = sum((p * d) ** 2 for p, d in zip(weights(adapters), dense, strict=True))
            assert np.sum(found.var(axis=0)) == pytest.approx(np.sum(want), rel=0.05)


def test_a_density_of_one_is_the_weighted_mean(zoo: Any, weights: Any) -> None:
    adapters = zoo.mixed()
    for on in ("product", "factors"):
        merged = zoo.merge("dare", adapters, 13, density=1.0, on=on, scale=0.5)
        zoo.close(
            zoo.dense(merged.state), {k: 0.5 * x for k, x in _exact(zoo, adapters, weights(adapters)).items()}, 1e-9
        )


def test_factors_keep_the_rank_so_nothing_is_lost(zoo: Any) -> None:
    assert zoo.merge("dare", zoo.mixed(), 9, on="factors").lost == 0.0
    assert zoo.merge("dare", zoo.mixed(), 3, on="product").lost > 0.2


def test_the_seed_decides_and_nothing_else(zoo: Any) -> None:
    one, same, other = (zoo.merge("dare", zoo.mixed(), 9, context={"seed": seed}).state for seed in (1, 1, 2))
    assert one == same and one != other


def test_the_mask_is_the_same_in_whatever_blocks_it_is_made(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _mask(77, 0, (12, 5), 0.5)
    assert all(np.array_equal(_mask(77, row, (1, 5), 0.5)[0], whole[row]) for row in range(12))
    assert 0 < whole.mean() < 1
    at_once = zoo.merge("dare", zoo.mixed(), 13)
    monkeypatch.setattr(elementwise, "HELD", 40)
    zoo.close(zoo.dense(zoo.merge("dare", zoo.mixed(), 13).state), zoo.dense(at_once.state), 1e-8)


def test_two_adapters_have_masks_of_their_own(zoo: Any) -> None:
    first = zoo.adapter("north", 1)
    twin = replace(first, name="south")
    merged = zoo.dense(zoo.merge("dare", [first, twin], 13, density=0.5).state)
    ratios = np.concatenate([(merged[k] / x).reshape(-1) for k, x in zoo.dense(first.state).items()])
    # 0, 1 or 2, as none, one or both kept it.
    assert {round(float(r)) for r in ratios} == {0, 1, 2} and np.abs(ratios - ratios.round()).max() < 1e-6


def test_only_the_change_since_a_common_start_is_dropped(zoo: Any, weights: Any) -> None:
    """Of an adapter that did not move nothing is dropped, and the mean over seeds is the weighted mean of adapters."""
    start = zoo.adapter("start", 9, 2)
    still = [replace(start, name="north"), replace(start, name="south")]
    merged = zoo.merge("dare", still, 13, context={"start": start.state})
    zoo.close(zoo.dense(merged.state), zoo.dense(start.state), 1e-9)
    adapters = zoo.mixed()
    exact = _exact(zoo, adapters, weights(adapters))
    for on in ("product", "factors"):
        draws = [
            zoo.dense(zoo.merge("dare", adapters, 17, on=on, context={"start": start.state, "seed": seed}).state)["up"]
            for seed in range(150)
        ]
        error = np.std(draws, axis=0) / np.sqrt(len(draws))
        assert np.max(np.abs(np.mean(draws, axis=0) - exact["up"]) / error) < 5
