"""The space of configurations: what is in it, what is beside what, and what trains."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.config import load_config
from fedgraft.server.method_card import count_of
from fedgraft.simulations.search.space import MODULES, Point, Space, sizes_up_to, space_of

TEXT, IMAGE, LM = "sequence-classification", "image-classification", "causal-lm"
SMALL = Space(8, {0: 1, 1: 1}, {0: 32, 1: 32}, {"serial": (0, 1, 8), "parallel": (0, 4), "prefix": (0, 2)})


def everything(space: Space) -> list[Point]:
    """Every point of a space that trains anything."""
    bits = [(0,), (1,), (0, 1)]
    sizes = list(product(*(space.sizes[module] for module in MODULES)))
    return [Point(layers, *each) for layers in bits for each in sizes if any(each)]


def test_the_grid_of_bert_base_is_the_papers() -> None:
    assert sizes_up_to(768) == (0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", TEXT), ("roberta", TEXT), ("gpt2", LM), ("llama", TEXT), ("t5", TEXT), ("vit", IMAGE)]
)
def test_what_trains_is_counted_without_a_model(lab: Any, family: str, task: str) -> None:
    space = space_of(lab.base(family, task).model)
    random = np.random.default_rng(0)
    for point in [*(space.drawn(random) for _ in range(3)), Point(tuple(space.layers), 1, 0, 0)]:
        adapter = lab.attach(family, task, "autopeft", layers=point.layers, options=point.method["options"])
        assert count_of(adapter.spec).adapter == space.numbers(point), point
    assert (space.sizes["prefix"] == (0,)) == (family in ("t5", "vit"))


def test_the_papers_configuration_trains_as_much_as_it_says() -> None:
    """AutoPEFT's on RTE: 0.76 % of BERT-base, whose biases the paper does not count."""
    keys = dict.fromkeys(range(12), 2 * 768)
    some = sizes_up_to(768)
    base = Space(768, dict.fromkeys(range(12), 1), keys, dict.fromkeys(MODULES, some))
    found = base.numbers(Point((2, 3, 7, 8, 9), 12, 96, 1))
    biases = 5 * (2 * 768 + 12 + 96)
    assert round(100 * (found - biases) / 109_482_240, 2) == 0.76


def test_neighbours_differ_in_one_thing_and_none_is_left_out() -> None:
    points = everything(SMALL)
    for point in points:

        def apart(other: Point, point: Point = point) -> int:
            return len({*point.layers} ^ {*other.layers}) + sum(getattr(point, m) != getattr(other, m) for m in MODULES)

        assert sorted(SMALL.neighbours(point)) == sorted(other for other in points if apart(other) == 1)


def test_every_point_can_be_drawn_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    assert {SMALL.drawn(random) for _ in range(2000)} == set(everything(SMALL))


def test_points_are_encoded_by_their_bits_and_the_places_of_their_sizes() -> None:
    rows = SMALL.encoded([Point((1,), 8, 0, 2), Point((0, 1), 1, 4, 0)])
    assert rows.tolist() == [[0, 1, 1, 0, 1], [1, 1, 0.5, 1, 0]]
    assert len({tuple(row) for row in SMALL.encoded(everything(SMALL)).tolist()}) == len(everything(SMALL))


def test_the_most_is_what_the_largest_trains() -> None:
    assert SMALL.most == max(SMALL.numbers(point) for point in everything(SMALL))


def test_a_points_overrides_make_its_method(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text('model = "builtin:tiny"\n[data]\nsites = ["a"]\n')
    point = Point((0, 2), 3, 0, 1)
    words = point.overrides.replace("'", "").split()
    assert words[::2] == ["--set"] * 5
    method = load_config(job, words[1::2]).method
    assert (method.name, method.layers, method.options) == ("autopeft", (0, 2), point.method["options"])
