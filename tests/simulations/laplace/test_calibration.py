"""How well chances tell what will be right, against a loop."""

from __future__ import annotations

import numpy as np
import pytest

from fedgraft.simulations.laplace.calibration import calibration


def test_calibration_is_that_of_a_loop() -> None:
    random = np.random.default_rng(0)
    chances = random.dirichlet([0.4, 0.4, 0.4], 200)
    labels = random.integers(0, 3, 200)
    found = calibration(chances, labels)
    right = [int(row.argmax() == label) for row, label in zip(chances, labels, strict=True)]
    error = 0.0
    for number in range(15):
        own = [at for at in range(200) if number <= chances[at].max() * 15 < number + 1]
        if own:
            gap = np.mean([right[at] for at in own]) - np.mean([chances[at].max() for at in own])
            error += len(own) / 200 * abs(gap)
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.loss == pytest.approx(
        -np.mean([np.log(row[label]) for row, label in zip(chances, labels, strict=True)])
    )
    assert found.error == pytest.approx(error)


def test_certainty_that_is_right_is_perfect_and_certainty_that_is_wrong_is_finite() -> None:
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert vars(calibration(sure, np.array([0, 1]))) == {"accuracy": 1.0, "loss": 0.0, "error": 0.0}
    wrong = calibration(sure, np.array([1, 0]))
    assert wrong.error == 1.0 and wrong.loss == pytest.approx(-np.log(1e-12))
