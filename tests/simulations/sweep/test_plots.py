"""The pictures hold every series once, with axes that say what they are; what cannot be drawn is not there."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.simulations.sweep import page
from fedgraft.simulations.sweep.plots import (
    PICTURES,
    accuracy_by_bytes,
    accuracy_by_epsilon,
    accuracy_by_round,
    as_element,
    as_file,
    series_of,
)
from fedgraft.simulations.sweep.results import Curve, Group, Results
from fedgraft.simulations.sweep.run import Outcome
from fedgraft.simulations.sweep.statistics import estimate


def group(
    strategy: str, promise: float | None, level: float, baseline: str = "", seeds: int = 3, rounds: int = 4
) -> Group:
    steps = range(1 if baseline == "none" else rounds + 1)
    curves = tuple(
        Curve(
            tuple(steps),
            tuple(level * (n + 1) / (rounds + 1) + 0.01 * seed for n in steps),
            tuple(0.0 if baseline else 1000.0 * len(strategy) * n for n in steps),
        )
        for seed in range(seeds)
    )
    values = (("strategy", strategy),) if not baseline else ()
    values += (("privacy.epsilon", f"{promise:g}"),) if promise else ()
    found = estimate(curve.accuracy[-1] for curve in curves)
    return Group(values, baseline, promise, {"accuracy": found}, seeds, seeds, "", curves)


def swept(*more: Group) -> Results:
    groups = [group(name, promise, 0.5 + 0.1 * n) for n, name in enumerate(("fedit", "ffa")) for promise in (2.0, 8.0)]
    return Results("made", ("strategy", "privacy.epsilon"), (), (*groups, *more))


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter() if node.tag.endswith("text")]


def test_a_series_is_a_setting_without_its_promise():
    found = series_of(swept(group("", 2.0, 0.3, "local"), group("", None, 0.1, "none")))
    assert [(one.label, len(one.groups)) for one in found] == [
        *(("fedit", 2), ("ffa", 2), ("each site alone", 1), ("no training", 1))
    ]
    assert len({one.marker for one in found}) == len({one.colour for one in found[:3]}) + 1


def test_many_series_stay_apart_by_colour_or_marker():
    results = Results("m", ("strategy",), (), tuple(group(f"s{n}", 2.0, 0.5) for n in range(20)))
    assert len({(one.colour, one.marker) for one in series_of(results)}) == 20


def test_the_budget_has_an_axis_on_which_no_privacy_comes_last():
    figure = accuracy_by_epsilon(swept(group("fedit", None, 0.9)))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "8", "no privacy"]
    assert list(axes.get_xticks()) == sorted(axes.get_xticks())
    assert "ε" in axes.get_xlabel() and "accuracy" in axes.get_ylabel()


def test_points_and_bars_are_the_means_and_their_intervals():
    results = swept()
    (axes,) = accuracy_by_epsilon(results).axes
    drawn = {round(float(y), 12) for line in axes.lines for y in line.get_ydata() if line.get_marker() not in "_|"}
    assert {round(found.estimates["accuracy"].mean, 12) for found in results.groups} <= drawn
    bars = {tuple(np.round(s[:, 1], 12)) for part in axes.collections for s in part.get_segments()}
    assert bars == {
        (round(e.low, 12), round(e.high, 12)) for e in (found.estimates["accuracy"] for found in results.groups)
    }


def test_two_seeds_are_drawn_without_the_bar_that_would_hide_all():
    results = Results("m", ("strategy",), (), (group("fedit", 2.0, 0.5, seeds=2),))
    (axes,) = accuracy_by_epsilon(results).axes
    heights = [abs(s[1, 1] - s[0, 1]) for part in axes.collections for s in part.get_segments()]
    assert heights == [0.0]


def test_accuracy_against_bytes_begins_with_the_first_that_were_sent():
    (axes,) = accuracy_by_bytes(swept(group("", 2.0, 0.3, "local"))).axes
    assert axes.get_xscale() == "log"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 4 and sorted({line.get_xdata()[0] for line in lines}) == [3000.0, 5000.0]
    levels = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert len(levels) == 1, "a site that is alone sends nothing, and is a level line"


def test_the_rounds_are_averaged_over_the_seeds():
    results = swept(group("", None, 0.1, "none"))
    (axes,) = accuracy_by_round(results).axes
    wanted = np.mean([curve.accuracy for curve in results.groups[0].curves], axis=0)
    assert any(len(line.get_ydata()) == 5 and np.allclose(line.get_ydata(), wanted) for line in axes.lines)


def test_a_round_that_some_seeds_have_not_reached_is_not_averaged():
    whole, cut = group("fedit", 2.0, 0.5, seeds=1), group("fedit", 2.0, 0.5, seeds=1, rounds=2)
    mixed = Group(whole.values, "", 2.0, whole.estimates, 2, 2, "", (*whole.curves, *cut.curves))
    (axes,) = accuracy_by_round(Results("m", ("strategy",), (), (mixed,))).axes
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_is_whole_and_keeps_its_words(name: str):
    results = swept(group("<$x_1$ & co", 2.0, 0.4))
    figure = PICTURES[name][1](results)
    svg = as_file(figure)
    words = texts(svg)
    assert "fedit" in words and "<$x_1$ & co" in words, "text as text, no formula"
    assert not re.search(r"#0[1-5]0[1-5]0[0-9a-f]", svg) and "var(--" not in svg
    assert as_file(PICTURES[name][1](results)) == svg, "the same results draw the same bytes"
    element = as_element(figure, name)
    assert element.startswith("<svg") and "var(--s0)" in element


def test_nothing_finished_draws_nothing_and_leaves_no_old_picture(tmp_path: Path):
    empty = Results("m", ("strategy",), (), ())
    assert [draw(empty) for _, draw in PICTURES.values()] == [None] * 3
    (tmp_path / "curves.svg").write_text("old")
    page.write(empty, tmp_path)
    assert not list(tmp_path.glob("*.svg")) and "nothing to draw" in (tmp_path / "report.html").read_text()


def test_the_page_holds_the_table_the_pictures_and_every_run(done: Outcome):
    html = (done.folder / "report.html").read_text()
    assert html.count("<svg") == 3 and "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")
    for found in done.results.rows:
        assert Path(found["path"]).name in html and found["digest"][:16] in html


def test_the_page_escapes_what_a_grid_says(tmp_path: Path):
    odd: Any = swept(group("<script>alert(1)</script>", 2.0, 0.4))
    page.write(odd, tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()
