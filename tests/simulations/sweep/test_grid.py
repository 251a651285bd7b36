"""A grid is read as it was meant, and its points have names of their own that any disk takes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.simulations.sweep.grid import Axis, Point, points, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("fedit,ffa, fedsa", ["fedit", "ffa", "fedsa"]),
        ("2", ["2"]),
        ('["a","b"],["c"]', ['["a","b"]', '["c"]']),
        ("{a = 1, b = [1,2]},{a = 2}", ["{a = 1, b = [1,2]}", "{a = 2}"]),
        ("\"a,b\",'c]'", ['"a,b"', "'c]'"]),
        ("flwr:X(1,2),iid", ["flwr:X(1,2)", "iid"]),
    ],
)
def test_commas_part_values_but_for_those_within_brackets_or_quotes(text, values):
    assert split_values(text) == values
    assert Axis.parse(f"key={text}") == Axis("key", tuple(values))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strategy", "write it as key=value,value"),
        ("=a", "write it as key=value,value"),
        ("strategy=", "a value is empty"),
        ("strategy=a,,b", "a value is empty"),
        ("strategy=a,b,a", "the value a is there twice"),
        ("seed=1,2", "use --seeds NUMBER"),
        ("simulation.baseline=none", "use --baselines"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(text, said):
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        Axis.parse(text)
    assert str(refusal.value).startswith(f"--grid {text}: ")


def test_every_combination_comes_once_and_a_seed_together():
    found = list(points([Axis("a", ("1", "2")), Axis("b", ("x", "y"))], [7, 8]))
    assert [(dict(p.values)["a"], dict(p.values)["b"], p.seed) for p in found] == [
        *(("1", "x", 7), ("1", "y", 7), ("2", "x", 7), ("2", "y", 7)),
        *(("1", "x", 8), ("1", "y", 8), ("2", "x", 8), ("2", "y", 8)),
    ]
    assert found[0].overrides == ["a=1", "b=x", "seed=7"]
    assert found[0].group == found[4].group != found[1].group


def test_a_key_that_is_there_twice_is_refused():
    with pytest.raises(UserError, match="the key is there twice"):
        list(points([Axis("a", ("1",)), Axis("a", ("2",))], [0]))


def test_a_plain_point_is_called_by_its_settings():
    point = Point((("strategy", "fedit"), ("privacy.epsilon", "2")), seed=0)
    assert point.name == "strategy=fedit,privacy.epsilon=2,seed=0"
    assert Point((), "local", 3).name == "baseline=local,seed=3"


@given(st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_any_two_points_have_different_safe_short_names(values):
    names = [Point((("data.path", value),), seed=0).name for value in values]
    assert names[0] != names[1]
    assert all(re.fullmatch(r"[A-Za-z0-9._,=+-]{1,120}", name) for name in names)
