"""The table says what was measured and no more."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fedgraft.simulations.sweep.results import Group, Results
from fedgraft.simulations.sweep.run import Outcome
from fedgraft.simulations.sweep.statistics import Estimate
from fedgraft.simulations.sweep.table import cells, markdown, notes, shown, terminal_table


def made(*accuracies: Estimate, keys: tuple[str, ...] = ("strategy", "privacy.epsilon")) -> Results:
    groups = tuple(
        Group(((keys[0], f"s{n}"), (keys[1], "2")), "", 2.0, {"accuracy": found}, 3, found.count, "", ())
        for n, found in enumerate(accuracies)
    )
    return Results("made", keys, (), groups)


def rendered(results: Results, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(results))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("measure", "found", "text"),
    [
        ("accuracy", Estimate(0.5123, 0.0131, 5), "51.2 ± 1.3 %"),
        ("accuracy", Estimate(0.5123, None, 1), "51.2 %"),
        ("accuracy", Estimate(0.5, 0.0, 3), "50.0 ± 0.0 %"),
        ("loss", Estimate(0.98765, 0.1, 3), "0.988"),
        ("bytes_up_site", Estimate(27260.0, 3.0, 3), "27.3 kB"),
        ("seconds", Estimate(1234.5, 3.0, 3), "1,234"),
        ("epsilon", None, "–"),
    ],
)
def test_a_cell_is_a_mean_with_half_its_interval(measure: str, found: Estimate | None, text: str):
    assert shown(measure, found) == text


def test_the_best_is_marked_in_the_terminal_and_in_the_file():
    results = made(Estimate(0.9, 0.01, 3), Estimate(0.8, 0.02, 3))
    assert "90.0 ± 1.0 % *" in rendered(results) and "80.0 ± 2.0 % *" not in rendered(results)
    assert "**90.0 ± 1.0 %**" in markdown(results) and "**80.0" not in markdown(results)
    assert any(note.startswith("marked is the best") for note in notes(results))


def test_a_table_without_a_winner_says_so():
    results = made(Estimate(0.9, 0.2, 3), Estimate(0.8, 0.2, 3))
    assert "*" not in rendered(results) and "**" not in markdown(results)
    assert any(note.startswith("nothing is marked") for note in notes(results))


def test_one_seed_gives_no_interval_and_the_note_says_so():
    found = notes(made(Estimate(0.9, None, 1)))
    assert len(found) == 1 and found[0].startswith("one seed tells no interval (n = 1)")


def test_seeds_that_are_missing_are_told():
    titles, (line, _) = cells(made(Estimate(0.9, 0.1, 2), Estimate(0.9, 0.1, 3)))
    assert titles[-1] == "n" and line[-1].text == "2/3"


def test_a_key_is_called_by_its_last_part_where_that_is_its_own():
    assert cells(made(Estimate(1, None, 1)))[0][:2] == ["strategy", "epsilon"]
    results = made(Estimate(1, None, 1), keys=("privacy.epsilon", "central.epsilon"))
    assert cells(results)[0][:2] == ["privacy.epsilon", "central.epsilon"]


def test_a_whole_table_fits_110_columns(done: Outcome):
    text = rendered(done.results)
    assert "…" not in text and max(map(len, text.splitlines())) <= 110
    for found in done.results.groups:
        assert shown("accuracy", found.estimates["accuracy"]) in text


def test_words_from_the_grid_break_neither_table_nor_markup():
    odd = made(Estimate(0.9, 0.1, 3))
    odd = replace(odd, groups=(replace(odd.groups[0], values=(("strategy", "[red]a|b"), ("privacy.epsilon", "2"))),))
    assert "[red]a|b" in rendered(odd)
    assert "[red]a\\|b" in markdown(odd)
