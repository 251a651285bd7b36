"""FLTrust against the published equations on dense vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.robust.distances import Path, moved
from fedgraft.strategies.robust.fltrust import trust_score

ROOT = "site-00"


def test_with_one_factor_frozen_it_is_the_published_equation_on_dw(bench: Any) -> None:
    """Then dW is linear in B, a straight line of factors is one of dW, and a mean of B is one of dW."""
    spec = bench.spec.with_policy("freeze", lambda tensor: tensor.role == "lora_A")
    start = bench.state(99, spec=spec)
    sent = [state.only(spec.select("share")) for state in bench.sent(7, spec)]
    sent[4] = (start - 3.0 * (sent[4].filled_from(start) - start)).only(spec.select("share"))
    zero = bench.dense(start)
    changes = [bench.dense(state.filled_from(start)) - zero for state in sent]
    root, total, trust = changes[0], np.zeros_like(zero), 0.0
    for g in changes:
        score = max(0.0, float(g @ root / (np.linalg.norm(g) * np.linalg.norm(root))))
        total, trust = total + score * np.linalg.norm(root) / np.linalg.norm(g) * g, trust + score
    got = bench.aggregate("fltrust", sent, start, weights=[1.0, 1e9, *[1.0] * 5], root=ROOT).filled_from(start)
    np.testing.assert_allclose(bench.dense(got) - zero, total / trust, rtol=1e-9, atol=1e-11)
    assert trust < 6  # the site that turned round counts nothing


def test_with_both_factors_free_each_update_is_brought_to_the_length_of_the_roots(bench: Any) -> None:
    start, sent = bench.start(), bench.sent(4)
    sent[2] = start + 8.0 * (sent[2] - start)
    zero = bench.dense(start)
    changes = [bench.dense(state) - zero for state in sent]
    length = np.linalg.norm(changes[0])
    weights = [max(0.0, float(g @ changes[0] / (np.linalg.norm(g) * length))) for g in changes]
    ends = [sent[0]]
    for state in sent[1:]:
        end = moved(start, state, Path.between(start, state).reach(length))
        assert np.linalg.norm(bench.dense(end) - zero) == pytest.approx(length, rel=1e-9)
        ends.append(end)
    want = {
        name: sum(w * end[name] for w, end in zip(weights, ends, strict=True)) / sum(weights)
        for name in bench.spec.names
    }
    bench.close(bench.aggregate("fltrust", sent, root=ROOT), want, rtol=1e-9)


def test_scores_are_cosines_above_zero() -> None:
    assert trust_score(6.0, 2.0, 4.0) == pytest.approx(0.75)
    assert trust_score(-6.0, 2.0, 4.0) == 0
    assert trust_score(8.0 * (1 + 1e-15), 2.0, 4.0) == 1
    assert trust_score(0.0, 0.0, 4.0) == 0 and trust_score(0.0, 4.0, 0.0) == 0


def test_where_nobody_agrees_the_root_is_alone(bench: Any) -> None:
    start = bench.start()
    root = bench.near(start, 1, step=1e-3)
    others = [start - factor * (root - start) for factor in (0.5, 1.0, 40.0)]
    bench.close(bench.aggregate("fltrust", [root, *others], root=ROOT), root, rtol=1e-15)


def test_a_root_that_moved_nothing_lets_nobody_move(bench: Any) -> None:
    start: AdapterState = bench.start()
    bench.close(bench.aggregate("fltrust", [start, *bench.sent(3)], root=ROOT), start, rtol=1e-15)


def test_a_site_that_moved_nothing_has_no_trust(bench: Any) -> None:
    start, sent = bench.start(), bench.sent(2)
    got = bench.aggregate("fltrust", [*sent, start], root=ROOT)
    bench.close(got, bench.aggregate("fltrust", sent, root=ROOT), rtol=1e-12)


def test_the_trusted_site_must_be_named_be_there_and_answer(bench: Any) -> None:
    with pytest.raises(UserError, match=r"strategy_options\.root: Field required"):
        create_aggregator("fltrust")
    with pytest.raises(UserError, match=r"no site of the run is called `nord`; there are east, north"):
        create_aggregator("fltrust", {"root": "nord"}).ranks = {"north": 4, "east": 4}
    with pytest.raises(UserError, match="the trusted site north did not answer in this round"):
        bench.aggregate("fltrust", bench.sent(3), root="north")
