"""Task arithmetic against dense sums, and how lambda is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_it_is_lambda_times_the_sum_of_dense_changes(zoo: Any) -> None:
    adapters = [zoo.adapter("north", 1, 2), zoo.adapter("south", 2, 4, alpha=3.0), zoo.adapter("west", 3, 3)]
    merged = zoo.merge("task-arithmetic", adapters, 9, scale=0.3)
    dense = [zoo.dense(x.state) for x in adapters]
    zoo.close(zoo.dense(merged.state), {k: 0.3 * sum(d[k] for d in dense) for k in dense[0]})
    np.testing.assert_allclose(
        merged.state["head.weight"], np.mean([x.state["head.weight"] for x in adapters], axis=0), rtol=1e-12
    )
    assert merged.weights == pytest.approx({"north": 0.3, "south": 0.3, "west": 0.3})


def test_weights_tilt_the_sum_and_keep_its_size(zoo: Any, weights: Any) -> None:
    adapters = zoo.mixed()
    merged = zoo.merge("task-arithmetic", adapters, 9, scale=0.3)
    dense = [zoo.dense(x.state) for x in adapters]
    want = {k: sum(0.3 * 3 * p * d[k] for p, d in zip(weights(adapters), dense, strict=True)) for k in dense[0]}
    zoo.close(zoo.dense(merged.state), want)


def test_without_a_score_lambda_is_the_recommended_one(zoo: Any) -> None:
    merged = zoo.merge("task-arithmetic", zoo.alike(), 9)
    fixed = zoo.merge("task-arithmetic", zoo.alike(), 9, scale=0.4)
    assert merged.state == fixed.state
    assert "0.4" in merged.notes[0] and not fixed.notes


def test_with_a_score_lambda_is_the_best_of_the_grid(zoo: Any) -> None:
    adapters = zoo.alike()
    goal = zoo.merge("task-arithmetic", adapters, 9, scale=0.7).state

    def score(state: Any) -> float:
        return -float(np.linalg.norm(zoo.dense(state)["up"] - zoo.dense(goal)["up"]))

    merged = zoo.merge("task-arithmetic", adapters, 9, context={"score": score, "labels": 3})
    assert merged.state == goal and "lambda = 0.7" in merged.notes[0]


def test_of_equal_scores_the_smallest_lambda_wins(zoo: Any) -> None:
    merged = zoo.merge("task-arithmetic", zoo.alike(), context={"score": lambda state: 1.0})
    assert "lambda = 0.1" in merged.notes[0]


def test_a_given_lambda_holds_for_one_adapter_too(zoo: Any) -> None:
    adapter = zoo.adapter("north", 1)
    merged = zoo.merge("task-arithmetic", [adapter], scale=0.5)
    zoo.close(zoo.dense(merged.state), {k: 0.5 * v for k, v in zoo.dense(adapter.state).items()})
