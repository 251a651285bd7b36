"""`fedgraft sweep` and `fedgraft compare`, as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgraft.cli import main
from fedgraft.simulations.sweep import worker
from fedgraft.simulations.sweep.run import Outcome


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``fedgraft("sweep", ...)``: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedgraft", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capsys.readouterr()
        return int(end.value.code or 0), out, error

    return run


def test_a_sweep_prints_a_line_a_run_and_the_table(fedgraft: Callable, short: Callable[..., str], tmp_path: Path):
    folder = tmp_path / "sweep"
    words = ("sweep", short(rounds=1), "--grid", "strategy=fedit,ffa", "--parallel", "1", "--threads", "1")
    code, out, error = fedgraft(*words, "--output", folder)
    assert code == 0
    assert "2 runs on 1 process" in error and "1/2  strategy=fedit,seed=5  accuracy " in error
    assert "one seed tells no interval" in out and str(folder / "report.html") in out
    assert max(map(len, out.splitlines()[:6])) <= 140
    code, out, error = fedgraft("sweep", "--resume", folder, "--json")
    assert code == 0 and "2 of 2 runs are finished already" in error
    assert json.loads(out) == json.loads((folder / "results.json").read_text())


def test_a_sweep_with_a_failed_run_says_so_and_exits_with_1(
    fedgraft: Callable, short: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(*given: object, **more: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(worker, "simulate", failing)
    words = ("--parallel", "1", "--threads", "1", "--output", tmp_path / "sweep")
    code, out, error = fedgraft("sweep", short(rounds=1), *words)
    assert code == 1 and "seed=5  failed: RuntimeError: no luck" in error and "failed: " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep"], "say what to run"),
        (["sweep", "CONFIG", "--grid", "strategy"], "--grid strategy: write it as key=value,value"),
        (["sweep", "CONFIG", "--baselines", "worst"], "--baselines worst: there are none, local, central, full"),
        (["sweep", "CONFIG", "--grid", "strategy=fedt"], "did you mean `fedit`?"),
        (["sweep", "CONFIG", "--engine", "warp"], "unknown engine `warp`"),
        (["sweep", "--resume", "nowhere"], "nowhere: holds no sweep"),
        (["sweep", "CONFIG", "--resume", "nowhere"], "leave out all that says what to run"),
        (["compare", "nowhere", "here"], "nowhere: no such run directory"),
        (["compare"], "see fedgraft --help"),
    ],
)
def test_a_mistake_is_one_line(fedgraft: Callable, short: Callable[..., str], tmp_path: Path, words, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = fedgraft(*(short() if word == "CONFIG" else word for word in words))
    assert code == 2 and out == ""
    assert error.count("\n") == 1 and error.startswith("fedgraft: ") and said in error
    assert not list(tmp_path.iterdir()), "nothing is written for a typo"


def test_runs_are_compared_in_the_terminal_in_files_and_as_json(fedgraft: Callable, done: Outcome, tmp_path: Path):
    runs = [done.folder / "runs" / name for name in ("strategy=fedit,seed=5", "strategy=ffa,seed=5")]
    code, out, _ = fedgraft("compare", *runs)
    assert code == 0 and "from the first" in out and "bytes up a site" in out
    code, out, _ = fedgraft("compare", *runs, "--output", tmp_path / "c.md")
    assert code == 0 and out == f"{tmp_path / 'c.md'}\n"
    code, out, _ = fedgraft("compare", *runs, "--json")
    assert code == 0 and json.loads(out)["differing"] == {"strategy": ["fedit", "ffa"]}
