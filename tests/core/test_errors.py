from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.core.errors import NonFiniteError, PrivateError, UserError, one_line


@given(st.text(alphabet=st.characters(codec=None), max_size=3000))
def test_a_user_error_is_one_short_printable_line(text):
    for shown in (str(UserError(text)), one_line(UserError(text)), one_line(ValueError(text))):
        assert shown.isprintable()
        assert len(shown.splitlines()) <= 1
        assert len(shown) <= 1100
        shown.encode()


def test_line_breaks_and_escapes_of_another_end_cannot_forge_a_log():
    assert str(UserError("tensor a\n2026-01-01 ERROR forged\x1b[31m\u202e")) == (
        "tensor a 2026-01-01 ERROR forged\\x1b[31m\\u202e"
    )


def test_a_long_line_keeps_its_end_where_the_mend_is():
    text = str(UserError("north: unknown tensor " + "x" * 100_000 + "; use one configuration everywhere"))
    assert text.startswith("north: unknown tensor xxx")
    assert text.endswith("xxx; use one configuration everywhere")
    assert len(text) < 1100


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("rank 4"), "rank 4"),
        (PrivateError("row 3"), "row 3"),
        (NonFiniteError("tensor a"), "tensor a"),
        (ValueError("a\n  b"), "ValueError: a b"),
        (KeyError("a"), "KeyError: 'a'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_only_foreign_errors_say_their_type(error, text):
    assert one_line(error) == text


def test_a_user_error_survives_a_process_boundary():
    again = pickle.loads(pickle.dumps(PrivateError("site north: row 3")))  # noqa: S301
    assert type(again) is PrivateError and str(again) == "site north: row 3"
