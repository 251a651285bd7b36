"""The attack's arithmetic against loops by hand, and on data where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedgraft.simulations.attack.lira import confidence, dp_tpr, likelihood_ratios, roc


def test_the_confidence_is_the_logit_of_the_right_answer() -> None:
    chance = np.array([0.001, 0.5, 0.9, 1 - 1e-6])
    assert np.allclose(confidence(-np.log(chance), classes=True), np.log(chance / (1 - chance)), rtol=1e-6)
    assert np.isfinite(confidence(np.array([0.0, 50.0, 800.0]), classes=True)).all()
    assert confidence(np.array([2.0]), classes=False).tolist() == [-2.0]


def test_the_likelihood_ratio_is_that_of_two_normals() -> None:
    random = np.random.default_rng(0)
    shadows, inside, target = random.normal(size=(8, 5)), random.random((8, 5)) < 0.5, random.normal(size=5)
    inside[:, 3] = True  # no shadow without it
    means = np.array(
        [
            [shadows[chosen[:, u], u].mean() if chosen[:, u].any() else math.nan for u in range(5)]
            for chosen in (inside, ~inside)
        ]
    )
    stds = []
    for side, chosen in enumerate((inside, ~inside)):
        rest = [(shadows[n, u] - means[side, u]) ** 2 for u in range(5) for n in range(8) if chosen[n, u]]
        freedom = sum(max(chosen[:, u].sum() - 1, 0) for u in range(5))
        stds.append(math.sqrt(sum(rest) / freedom))
    want = stats.norm.logpdf(target, means[0], stds[0]) - stats.norm.logpdf(target, means[1], stds[1])
    got = likelihood_ratios(target, shadows, inside)
    assert math.isnan(got[3]) and np.allclose(np.delete(got, 3), np.delete(want, 3), atol=1e-12)


def test_the_roc_counts_pairs() -> None:
    scores = np.array([3.0, 2.0, 2.0, 1.0, 0.5, math.nan])
    member = np.array([True, True, False, False, True, True])
    found = roc(scores, member)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in (3.0, 2.0, 0.5) for b in (2.0, 1.0)]
    assert found.auc == pytest.approx(np.mean(pairs))
    assert (found.members, found.others) == (3, 2)
    assert found.fpr.tolist() == [0, 0, 0.5, 1, 1] and np.allclose(found.tpr, [0, 1 / 3, 2 / 3, 2 / 3, 1])
    assert float(np.trapezoid(found.tpr, found.fpr)) == pytest.approx(found.auc)
    assert found.tpr_at(0.5) == pytest.approx(2 / 3)
    assert found.tpr_at(0.1) is None, "two others cannot show a false alarm in ten"


def test_the_standard_error_is_the_spread_of_the_auc() -> None:
    random = np.random.default_rng(1)
    member = np.arange(160) < 60
    aucs, errors = [], []
    for _ in range(2000):
        found = roc(random.normal(size=160) + 0.8 * member, member)
        aucs.append(found.auc)
        errors.append(found.error)
    assert np.mean(aucs) == pytest.approx(stats.norm.cdf(0.8 / math.sqrt(2)), abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(aucs), rel=0.06)


def test_several_targets_are_a_sample_of_targets() -> None:
    random = np.random.default_rng(2)
    targets = np.repeat(np.arange(4), 100)
    member = random.random(400) < 0.5
    # Each target leaks by its own amount: more than any one of them could tell by itself.
    scores = random.normal(size=400) + member * np.repeat([0.0, 0.5, 1.0, 1.5], 100)
    each = [roc(scores[targets == t], member[targets == t]).auc for t in range(4)]
    found = roc(scores, member, targets)
    assert found.auc == pytest.approx(np.mean(each)) and found.error == pytest.approx(np.std(each, ddof=1) / 2)


def simulated(leak: float, shadows: int, units: int = 3000, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences of units of very different difficulty, higher by ``leak`` where a model trained on the unit."""
    random = np.random.default_rng(seed)
    hard = 3 * random.normal(size=units)
    inside = random.random((shadows + 1, units)) < 0.5
    sure = hard + leak * inside + random.normal(size=inside.shape)
    return sure, inside, hard


def test_where_nothing_leaks_the_attack_guesses() -> None:
    for shadows in (4, 16):
        sure, inside, _ = simulated(0.0, shadows)
        found = roc(likelihood_ratios(sure[0], sure[1:], inside[1:]), inside[0])
        assert abs(found.auc - 0.5) < 4 * found.error and found.error < 0.02


def test_where_something_leaks_the_attack_finds_it_and_confidence_alone_does_not() -> None:
    sure, inside, _ = simulated(2.0, 32)
    found = roc(likelihood_ratios(sure[0], sure[1:], inside[1:]), inside[0])
    # Two normals of distance 2, the means known: the AUC is Phi(sqrt 2) = 0.921.
    assert 0.88 < found.auc < 0.93
    naive = roc(sure[0], inside[0])
    assert naive.auc < 0.70
    assert found.tpr_at(0.01) > 5 * naive.tpr_at(0.01)  # type: ignore[operator]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 1e-3), (4.0, 0.01)])
def test_the_bound_of_privacy_is_reached_by_randomised_response_and_by_no_more(epsilon: float, delta: float) -> None:
    """Gives the bit away with chance delta, else tells it rightly with chance e / (1 + e); every threshold of it."""
    right = (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    wrong = (1 - delta) / (1 + math.exp(epsilon))
    fpr = np.array([0.0, wrong, wrong + right, 1.0])
    tpr = np.array([delta, delta + right, 1.0, 1.0])
    assert np.allclose(dp_tpr(fpr, epsilon, delta), tpr, atol=1e-12)
    grid = np.linspace(0, 1, 101)
    bound = dp_tpr(grid, epsilon, delta)
    assert (bound >= grid - 1e-12).all() and (np.diff(bound) >= 0).all() and bound.max() == 1
    assert dp_tpr(np.array([0.1]), 1000.0, 0.0).tolist() == [1.0]
