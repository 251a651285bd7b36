"""Fed-MedLoRA+: weights by size and by what an adapter scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import NonFiniteError, UserError
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator


def scored(rule: Any, scores: Mapping[str, float], arrived: list[Update]) -> list[AdapterState]:
    """Let ``rule`` find in each update the score of its site; gives the adapters that it asked about."""
    of = {update.state.digest: scores[update.site] for update in arrived}
    asked: list[AdapterState] = []

    def score(state: AdapterState) -> float:
        asked.append(state)
        shared = state.spec.select("share")
        return of[state.only(shared).digest]

    rule.score = score
    return asked


def one_round(rule: Any, start: AdapterState, arrived: list[Update]) -> AdapterState:
    rule.start_round(start)
    for update in arrived:
        rule.add(update)
    return rule.result()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 3.0])
def test_the_mean_is_weighted_by_size_and_by_the_exponential_of_the_score(
    toy: Callable[..., Any], temperature: float
) -> None:
    rule = create_aggregator("medlora", {"temperature": temperature})
    draw = toy(rule).draw
    sizes, scores = {"p": 10.0, "q": 300.0, "r": 45.0}, {"p": 0.9, "q": 0.6, "r": 0.85}
    arrived = [Update(site, draw(k), sizes[site]) for k, site in enumerate("pqr", 1)]
    scored(rule, scores, arrived)
    got = one_round(rule, draw(0), arrived)
    weights = [sizes[u.site] * math.exp(scores[u.site] / temperature) for u in arrived]
    for name in got:
        want = sum(w * u.state[name] for w, u in zip(weights, arrived, strict=True)) / sum(weights)
        np.testing.assert_allclose(got[name], want, rtol=1e-11)


def test_equal_scores_are_fedit(toy: Callable[..., Any]) -> None:
    rule, plain = create_aggregator("medlora"), create_aggregator("fedit")
    draw = toy(rule).draw
    arrived = [Update(site, draw(k), float(k)) for k, site in enumerate("pqr", 1)]
    scored(rule, dict.fromkeys("pqr", 0.4), arrived)
    got, want = one_round(rule, draw(0), arrived), one_round(plain, draw(0), arrived)
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-13)


def test_a_useless_adapter_of_a_site_that_claims_to_be_large_counts_little(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("medlora")
    draw = toy(rule).draw
    arrived = [Update("p", draw(1), 100.0), Update("q", draw(2), 10_000.0)]
    scored(rule, {"p": 0.95, "q": 0.05}, arrived)
    got = one_round(rule, draw(0), arrived)
    share = 10_000 * math.exp(-9.0) / (100 + 10_000 * math.exp(-9.0))
    assert share < 0.013
    np.testing.assert_allclose(
        got["a"], (1 - share) * arrived[0].state["a"] + share * arrived[1].state["a"], rtol=1e-12
    )


def test_what_is_scored_is_the_whole_adapter(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("medlora")
    play = toy(rule)
    spec = play.spec.with_policy("local", lambda tensor: tensor.name == "head")
    start, sent = play.draw(0).with_spec(spec), play.draw(1).with_spec(spec).only(["a", "b"])
    asked = scored(rule, {"p": 0.5}, [Update("p", sent, 1.0)])
    one_round(rule, start, [Update("p", sent, 1.0)])
    (state,) = asked
    assert set(state) == set(spec.names)
    assert np.array_equal(state["head"], start["head"]) and np.array_equal(state["a"], sent["a"])


def test_without_records_of_the_servers_it_says_what_to_set(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("medlora")
    start = toy(rule).draw(0)
    rule.start_round(start)
    with pytest.raises(UserError, match=r"name them in server\.validation"):
        rule.add(Update("p", start, 1.0))


@pytest.mark.parametrize("found", [float("nan"), -0.1, 1.1])
def test_a_score_that_is_no_accuracy_is_refused(toy: Callable[..., Any], found: float) -> None:
    rule = create_aggregator("medlora")
    start = toy(rule).draw(0)
    rule.score = lambda state: found
    rule.start_round(start)
    with pytest.raises(UserError, match="p: its adapter scores"):
        rule.add(Update("p", start, 1.0))


def test_numbers_that_are_none_are_refused_before_they_are_scored(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("medlora")
    start = toy(rule).draw(0)
    asked: list[AdapterState] = []

    def score(state: AdapterState) -> float:
        asked.append(state)
        return 0.5

    rule.score = score
    rule.start_round(start)
    with pytest.raises(NonFiniteError, match="tensor b"):
        rule.add(Update("p", AdapterState(start.spec, {**start, "b": np.full((3, 2), np.inf)}), 1.0))
    assert not asked


@pytest.mark.slow
def test_a_whole_run_scores_on_the_servers_records(tiny_federation: Any, tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    rows = [{"text": row["text"], "label": row["label"]} for row in tiny_federation.rows[:30]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"strategy": "medlora", "server.validation": str(path), "rounds": 2}
    run = tiny_federation.run(tiny_federation.config(**settings), tmp_path / "run")
    plain = tiny_federation.run(tiny_federation.config(rounds=2), tmp_path / "plain")
    assert run["status"] == "finished" and run["digest"] != plain["digest"]
    with pytest.raises(UserError, match=r"server\.validation"):
        tiny_federation.run(tiny_federation.config(strategy="medlora"), tmp_path / "without")
