"""Layer 2 of the audit: how far neighbours may lie apart."""

from __future__ import annotations

import pytest

from fedgraft.privacy.audit.sensitivity import Neighbours, sensitivity


@pytest.mark.parametrize(
    ("distance", "replaced", "good"),
    [
        (0.0, False, True),
        (2.0, False, True),
        (2.0019, False, True),
        (2.0021, False, False),
        (4.0, True, True),
        (4.01, True, False),
        (float("nan"), False, False),
        (float("inf"), True, False),
    ],
)
def test_the_bound_is_the_clip_and_twice_that_for_a_replaced_unit(distance: float, replaced: bool, good: bool) -> None:
    assert sensitivity([Neighbours("pair", 2.0, distance, replaced)], 1e-3).good is good


def test_the_pair_that_breaks_the_bound_is_named() -> None:
    verdict = sensitivity([Neighbours("kept", 1.0, 0.5), Neighbours("broken", 0.5, 3.0)], 1e-3)
    assert verdict.findings == ("broken: the sums differ by 6 C, where 1 C is promised",)
    assert verdict.statistics["largest"] == 6.0
    assert [pair["name"] for pair in verdict.statistics["pairs"]] == ["kept", "broken"]
