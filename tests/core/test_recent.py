from __future__ import annotations

import pytest

from fedgraft.core.recent import Recent


def test_what_was_asked_for_last_stays_and_the_rest_is_made_anew():
    made: list[str] = []
    recent: Recent[str, str] = Recent(2)

    def ask(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [ask(key) for key in "abab"] == list("ABAB") and made == ["a", "b"]
    ask("a"), ask("c"), ask("a")
    assert made == ["a", "b", "c"]
    ask("b")
    assert made == ["a", "b", "c", "b"]


def test_without_a_bound_nothing_is_forgotten():
    made: list[int] = []
    recent: Recent[int, int] = Recent(None)
    for _ in range(2):
        for key in range(1000):
            recent.get(key, lambda key=key: made.append(key) or key)
    assert made == list(range(1000))


def test_a_failure_is_not_kept():
    recent: Recent[str, int] = Recent(1)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 3) == 3
