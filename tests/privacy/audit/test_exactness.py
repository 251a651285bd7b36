"""Layer 1 of the audit: what counts as equal."""

from __future__ import annotations

import pytest
import torch

from fedgraft.privacy.audit.exactness import Case, clipped_sum, exactness

TENSORS = [("a", 30), ("b", 10)]


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_clipped_sum_is_that_of_a_loop() -> None:
    some = rows()
    for clip in (0.1, 6.0, 100.0):
        want = [0.0] * 40
        for row in some.tolist():
            norm = sum(value * value for value in row) ** 0.5
            want = [w + value * min(1.0, clip / norm) for w, value in zip(want, row, strict=True)]
        assert torch.allclose(clipped_sum(some, clip), torch.tensor(want, dtype=torch.float64), atol=1e-12)
    assert float(clipped_sum(torch.zeros(3, 4), 1.0).norm()) == 0
    assert clipped_sum(torch.zeros(0, 4), 1.0).tolist() == [0] * 4


def test_equal_sums_are_good_and_say_how_equal() -> None:
    want = clipped_sum(rows(), 1.0)
    verdict = exactness([Case("first", 1.0, want * (1 + 1e-6), want)], TENSORS, 1e-3)
    assert verdict.good and verdict.layer == "exactness"
    assert verdict.statistics["largest"] == pytest.approx(1e-6, rel=0.1)


def test_one_wrong_tensor_is_named() -> None:
    want = clipped_sum(rows(), 1.0)
    wrong = want.clone()
    wrong[30:] *= 1.01
    verdict = exactness([Case("good", 1.0, want, want), Case("bad", 1.0, wrong, want)], TENSORS, 1e-3)
    assert not verdict.good
    (finding,) = verdict.findings
    assert finding.startswith("bad: tensor b is 0.01 of its norm away")


def test_a_small_tensor_is_not_hidden_by_a_large_one() -> None:
    want = torch.cat([torch.full((30,), 100.0), torch.full((10,), 1.0)]).double()
    wrong = want.clone()
    wrong[30:] *= 1.1
    # As a share of the whole this is 6e-4, within the tolerance.
    assert float((wrong - want).norm() / want.norm()) < 1e-3
    assert not exactness([Case("", 1.0, wrong, want)], TENSORS, 1e-3).good


def test_rounding_in_a_tensor_without_a_gradient_is_no_finding() -> None:
    want = torch.cat([torch.ones(30), torch.zeros(10)]).double()
    assert exactness([Case("", 1.0, want + 1e-8, want)], TENSORS, 1e-3).good


def test_a_sum_that_is_not_a_number_is_wrong() -> None:
    want = clipped_sum(rows(), 1.0)
    for bad in (float("nan"), float("inf")):
        wrong = want.clone()
        wrong[3] = bad
        assert not exactness([Case("", 1.0, wrong, want)], TENSORS, 1e-3).good
