"""`fedgraft privacy plan | epsilon | noise`: what they print, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.privacy import commands
from fedgraft.privacy.accounting import Event, calibrate_noise, epsilon

EPSILON = ("epsilon", "--noise", "1", "--rate", "0.01", "--steps", "1000", "--delta", "1e-5")
NOISE = ("noise", "--epsilon", "3", "--rate", "0.05", "--steps", "100", "--delta", "1e-5")
PLAN = ("plan", "--units", "500", "--batch", "40", "--rounds", "4", "--local-steps", "3", "--accountant", "rdp")
Said = tuple[int, str, str]


@pytest.fixture
def privacy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Said]:
    """Run `fedgraft privacy` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedgraft", "privacy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err  # type: ignore[return-value]

    return run


def test_epsilon_is_one_line_that_says_under_what(privacy: Callable[..., Said]) -> None:
    code, out, err = privacy(*EPSILON)
    assert (code, err) == (0, "")
    assert out == "epsilon 1.829 at delta 1e-05: noise 1, rate 0.01, 1,000 steps (add/remove, pld)\n"


def test_epsilon_answers_in_json_with_what_it_was_asked(privacy: Callable[..., Said]) -> None:
    code, out, _ = privacy(*EPSILON, "--neighbours", "replace_one", "--accountant", "rdp", "--json")
    told = json.loads(out)
    assert code == 0
    assert told.pop("epsilon") == epsilon((Event(1.0, 0.01, 1000),), 1e-5, "replace_one", "rdp")
    assert told == {
        "noise": 1.0,
        "rate": 0.01,
        "steps": 1000,
        "delta": 1e-5,
        "neighbours": "replace_one",
        "accountant": "rdp",
    }


def test_epsilon_can_be_checked_by_a_second_computation(privacy: Callable[..., Said]) -> None:
    told = json.loads(privacy(*EPSILON, "--check", "--json")[1])
    assert told["check"]["least"] <= told["epsilon"] == pytest.approx(told["check"]["estimate"], rel=5e-3)
    assert "an independent computation gives 1.828" in privacy(*EPSILON, "--check")[1]


def test_what_is_shown_is_never_below_the_truth(privacy: Callable[..., Said]) -> None:
    for noise in ("0.9", "1.3", "2.7", "8"):
        out = privacy("epsilon", "--noise", noise, "--rate", "0.1", "--steps", "7", "--delta", "1e-4")[1]
        assert float(out.split()[1]) >= epsilon((Event(float(noise), 0.1, 7),), 1e-4)


def test_noise_is_one_line_or_json(privacy: Callable[..., Said]) -> None:
    least = calibrate_noise(3.0, 1e-5, 0.05, 100, most=1e4)
    code, out, _ = privacy(*NOISE)
    assert code == 0 and out.count("\n") == 1
    assert least <= float(out.split()[1].rstrip(",")) < least + 1e-2
    told = json.loads(privacy(*NOISE, "--json")[1])
    assert (told["noise"], told["epsilon"]) == (least, epsilon((Event(least, 0.05, 100),), 1e-5))
    assert told["epsilon"] <= 3.0


def test_the_plan_fits_a_terminal_and_draws_itself(privacy: Callable[..., Said], tmp_path: Path) -> None:
    code, out, err = privacy(*PLAN)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for words in (
        "epsilon 8 at delta 0.0001, any one record added or removed",
        "4 rounds x 3 = 12",
        "40 of 500 records a step",
        "x clip on each coordinate of a step's mean gradient",
        "0.05 of 1/500",
        "plot: privacy-plan.png",
    ):
        assert words in out
    assert out.count("*") == 4  # the planned value on each axis, and the note that says so
    assert (tmp_path / "privacy-plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_says_what_correlated_noise_is_worth(privacy: Callable[..., Said]) -> None:
    out = privacy(*PLAN, "--sampler", "cyclic", "--bands", 12, "--epsilon", 30)[1]
    assert "over 12 steps: the noise in the run's sums is 1.5 times less" in out
    assert "each in its turn, surely" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_plan_in_json_draws_only_where_it_is_told_to(privacy: Callable[..., Said], tmp_path: Path) -> None:
    told = json.loads(privacy(*PLAN, "--json")[1])
    assert told["plot"] is None and not list(tmp_path.iterdir())
    assert told["epsilon"] <= told["budget"] == 8.0
    assert told["epsilon"] == epsilon((Event(told["noise"], 0.08, 12),), told["delta"], accountant="rdp")
    assert told["on_the_mean"] == told["noise"] / 40
    assert {name: len(rows) for name, rows in told["tradeoff"].items()} == {"noise": 5, "batch": 5, "rounds": 5}
    assert json.loads(privacy(*PLAN, "--json", "--output", "here.png")[1])["plot"] == "here.png"
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


def test_the_plan_reads_a_runs_file_and_takes_what_is_said_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "m"\nrounds = 2\n[data]\nsites = ["a"]\n[train]\nlocal_steps = 3\n[privacy]\nunit = "patient"\n'
    )
    run, units = commands._run(path, 300, {"rounds": 7, "privacy.epsilon": 2.0, "privacy.sampler": "cyclic"})
    assert (units, run.total_steps, run.privacy.unit) == (300, 21, "patient")
    assert (run.privacy.epsilon, run.privacy.sampler) == (2.0, "cyclic")


def test_without_a_word_the_plan_is_for_a_thousand_records() -> None:
    run, units = commands._run(None, None, {})
    assert (units, run.train.batch_size, run.privacy.delta, run.privacy.unit) == (1000, 125, 1e-4, "record")
    run, units = commands._run(None, 60, {"train.local_steps": 9, "privacy.unit": "patient"})
    assert (units, run.train.batch_size, run.privacy.delta) == (60, 7, 1e-3)
    assert (run.train.local_steps, run.privacy.unit) == (9, "patient")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*EPSILON, "--noise", 0], "--noise 0: it must be a positive number"),
        ([*EPSILON, "--noise", "nan"], "--noise nan"),
        ([*EPSILON, "--noise", "x"], "Invalid value for '--noise'"),
        ([*EPSILON, "--noise", 1e-9], "--noise 1e-09: so little over 1,000 steps"),
        ([*EPSILON, "--rate", 0], "--rate 0: it must be above 0"),
        ([*EPSILON, "--rate", 1.01], "--rate 1.01"),
        ([*EPSILON, "--steps", 0], "--steps 0: there must be at least one"),
        ([*EPSILON, "--delta", 0], "--delta 0: it must be between 0 and 1"),
        ([*EPSILON, "--delta", 1], "--delta 1"),
        ([*EPSILON, "--delta", 1e-13], "privacy.delta 1e-13 is smaller than the arithmetic"),
        ([*EPSILON, "--accountant", "gdp"], "privacy.accountant `gdp` cannot be chosen"),
        ([*EPSILON, "--neighbours", "both"], "privacy.neighbours is `both`"),
        ([*EPSILON, "--noise", 0.01, "--check"], "--check: the check knows no noise below"),
        (["epsilon", "--noise", 1], "Missing option '--rate'"),
        ([*NOISE, "--epsilon", -1], "--epsilon -1: it must be a positive number"),
        ([*NOISE, "--epsilon", "inf"], "--epsilon inf"),
        ([*NOISE, "--epsilon", 1e-4, "--rate", 1, "--steps", 10**8], "even noise 10000 gives"),
        ([*NOISE, "--accountant", "gaussian"], "privacy.accountant `gaussian` cannot be chosen"),
        (["plan", "--units", 0], "--units 0: a site has at least one"),
        (["plan", "--units", 9, "--batch", 10], "train.batch_size 10 is more than the site's 9 records"),
        (["plan", "--delta", 0.01], "privacy.delta 0.01 is not below 1/1000"),
        (["plan", "--sampler", "shuffle"], "privacy.sampler"),
        (["plan", "--sampler", "cyclic", "--bands", 9], "privacy.bands 9 is more than the 8 steps"),
        (["plan", "--noise", 0.2], "noise multiplier 0.2 spends epsilon"),
        (["plan", "run.toml"], "run.toml: say with --units"),
        (["plan", "run.toml", "--units", 10], "run.toml: no such configuration file"),
        ([*PLAN, "--output", "no/where.png"], "no/where.png: the plot cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(privacy: Callable[..., Said], arguments: list[Any], says: str) -> None:
    code, out, err = privacy(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fedgraft: ") and err.count("\n") == 1
    assert says in err


def test_the_commands_answer_in_seconds_imports_included() -> None:
    """Generously: both take under two seconds on two quiet cores."""
    began = time.monotonic()
    for arguments in (EPSILON, NOISE):
        done = subprocess.run(
            [sys.executable, "-c", "from fedgraft.cli import main; main()", "privacy", *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0
        assert {"epsilon", "noise"} <= set(json.loads(done.stdout))
    assert time.monotonic() - began < 60
